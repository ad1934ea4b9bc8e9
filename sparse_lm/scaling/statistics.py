"""Means over seeds and text, their confidence intervals, and verdicts on differences.

A loss is measured by several seeds on the same rows of text, so its noise is of two kinds. Other seeds would have given
other losses, and so would other text, to all seeds alike: more seeds do not make up for few rows. Both are in an
interval, as the crossed random effects of seeds and stretches of text (two-way layout without replication, Scheffé,
The Analysis of Variance, 1959, chapter 7). A stretch is some neighbouring rows, since rows of one document, and
documents of one folder, resemble each other; a bootstrap over rows would take them for independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

BETTER, WORSE, SAME = "better", "worse", "no difference seen"
NOT_JUDGED = "one seed: not judged"
NOT_RANKED = "not ranked"
DIVERGED = "not judged: a loss is not finite"

STRETCHES = 8  # of text, at most: long ones, so that few documents are in two
LEVEL = 0.95


@dataclass(frozen=True)
class Noise:
    """What a mean is uncertain by: the standard error from each kind of noise, None where it can't be known."""

    seeds: float | None
    text: float | None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def confidence_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """Computes Student's t-interval (low, high) of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    center = mean(values)
    deviation = math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return center - half, center + half


def ratio_interval(ratios: Sequence[float], level: float = LEVEL) -> tuple[float, tuple[float, float] | None]:
    """Computes the mean of ratios and its interval, both of their logarithms: twice and half as fast make once."""
    logs = [math.log(ratio) for ratio in ratios]
    bounds = confidence_interval(logs, level)
    return math.exp(mean(logs)), bounds and (math.exp(bounds[0]), math.exp(bounds[1]))


def count_stretches(rows: int) -> int:
    """How many stretches of text so many rows make."""
    return min(STRETCHES, rows)


def measure_noise(losses: Float[np.ndarray, "S R"], tokens: Float[np.ndarray, " R"]) -> Noise:
    """Splits the noise of a mean loss per token into that of seeds and that of text.

    With mean squares M of S seeds, of G stretches and of what is left, the squares of the standard errors are
    M_seeds / (S G) and (M_text - M_left) / (S G): noise of single seeds on single stretches counts with the seeds.

    Args:
        losses: summed over the tokens of each row, in the order of the text; of S seeds, or differences of two sides.
        tokens: of each row.
    """
    seeds, stretches = len(losses), count_stretches(len(tokens))
    starts = np.arange(stretches) * len(tokens) // stretches
    losses, tokens = np.add.reduceat(losses, starts, axis=1), np.add.reduceat(tokens, starts)
    # What each seed and stretch moves the ratio of sums by, to first order: stretches have different numbers of tokens.
    per_token = losses.sum() / (seeds * tokens.sum())
    moves = (losses - per_token * tokens) / tokens.mean()
    by_seed, by_stretch = moves.mean(axis=1, keepdims=True), moves.mean(axis=0, keepdims=True)
    of_seeds = stretches * (by_seed**2).sum() / (seeds - 1) if seeds > 1 else None
    of_text = seeds * (by_stretch**2).sum() / (stretches - 1) if stretches > 1 else None
    left = 0.0
    if seeds > 1 and stretches > 1:
        left = ((moves - by_seed - by_stretch) ** 2).sum() / ((seeds - 1) * (stretches - 1))
    error = lambda square: None if square is None else math.sqrt(max(square, 0.0) / (seeds * stretches))
    return Noise(error(of_seeds), error(None if of_text is None else of_text - left))


def mean_interval(
    center: float, noise: Noise, seeds: int, rows: int, level: float = LEVEL
) -> tuple[float, float] | None:
    """Computes the interval of a mean over seeds and text; None for one seed.

    Each standard error times its quantile of Student's t, added as squares (Graybill and Wang, "Confidence intervals on
    nonnegative linear combinations of variances", JASA 1980): exact where all noise is of one kind, and wide enough
    between.
    """
    if noise.seeds is None:
        return None
    quantile = lambda n: float(stats.t.ppf((1 + level) / 2, n - 1))
    half = quantile(seeds) * noise.seeds
    if noise.text:
        half = math.hypot(half, quantile(count_stretches(rows)) * noise.text)
    return center - half, center + half


def judge_difference(center: float | None, bounds: tuple[float, float] | None) -> str:
    """Judges a mean difference of losses: `BETTER` or `WORSE` only if its interval excludes 0.

    Args:
        center: the mean difference from the baseline; None if a loss is not finite.
        bounds: of its interval; None for one seed.
    """
    if center is None:
        return DIVERGED
    if bounds is None:
        return NOT_JUDGED
    low, high = bounds
    return BETTER if high < 0 else WORSE if low > 0 else SAME
