"""How often the intervals and verdicts of a comparison are right, where the truth is known.

    python -m experiments.coverage [--draws=3000]

Draws differences of losses whose true mean is 0, of several seeds on the same rows. Prints the share of intervals of
95 % that hold 0, with normal noise of several kinds; then how often there is a verdict although there is no difference,
where the noise of seeds is skewed: one seed in ten, say, trains less well.
"""

import math
import sys
from collections.abc import Callable

import numpy as np
from absl import flags

from sparse_lm.cost.info import format_table
from sparse_lm.scaling.statistics import SAME, judge_difference, mean_interval, measure_noise

TOKENS = 128.0  # of a row
# Standard deviations of seeds, of documents, and of what single seeds make of single rows, for 64 rows.
NOISES = {
    "seeds": (1.0, 0.0, 0.0),
    "text": (0.0, 1.0, 0.0),
    "rest": (0.0, 0.0, 1.0),
    "all": (1.0, 8.0, 8.0),
    "little of seeds": (0.1, 8.0, 3.0),
}
SKEWED = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "exponential": lambda rng, shape: rng.exponential(size=shape) - 1,
    "log-normal": lambda rng, shape: rng.lognormal(size=shape) - math.exp(0.5),
    "one in ten": lambda rng, shape: (rng.random(shape) < 0.1) - 0.1 + 0.01 * rng.normal(size=shape),
}


def simulate_coverage(noise: str, seeds: int, rows: int, draws: int, of_seed: Callable = SKEWED["normal"]) -> float:
    """Simulates comparisons without a difference and returns the share of those in which none is seen.

    Args:
        noise: one of `NOISES`.
        seeds: of each side.
        rows: of text; with more than 64, documents have ten each.
        draws: how many comparisons.
        of_seed: (generator, shape) -> noise of seeds of mean 0.
    """
    rng, scale = np.random.default_rng([seeds, rows, len(noise)]), math.sqrt(rows / 64)
    seed_noise, text_noise, rest = NOISES[noise]
    documents, tokens, right = 10 if rows > 64 else 1, np.full(rows, TOKENS), 0
    for _ in range(draws):
        text = np.repeat(rng.normal(size=-(-rows // documents)), documents)[:rows]
        losses = seed_noise * of_seed(rng, (seeds, 1)) + text_noise * scale * text
        if rest:
            losses = losses + rest * scale * rng.normal(size=(seeds, rows))
        losses = losses * TOKENS
        center = losses.sum() / (seeds * tokens.sum())
        right += judge_difference(center, mean_interval(center, measure_noise(losses, tokens), seeds, rows)) == SAME
    return right / draws


def main() -> None:
    values = flags.FlagValues()
    flags.DEFINE_integer("draws", 3000, "comparisons of each kind", flag_values=values)
    values(sys.argv)
    sizes = [(seeds, rows) for rows in (64, 10_000) for seeds in (2, 3, 10)]
    head = ["noise", *(f"{seeds} seeds, {rows:,} rows" for seeds, rows in sizes)]
    table = [[noise, *(f"{simulate_coverage(noise, *size, values.draws):.3f}" for size in sizes)] for noise in NOISES]
    print(format_table([head, *table]), end="\n\n")
    counts = (2, 3, 5, 10, 20)
    rates = lambda draw: [f"{1 - simulate_coverage('seeds', seeds, 8, values.draws, draw):.3f}" for seeds in counts]
    head = ["noise of seeds: verdicts", *(f"{seeds} seeds" for seeds in counts)]
    print(format_table([head, *([name, *rates(draw)] for name, draw in SKEWED.items())]))


if __name__ == "__main__":
    main()
