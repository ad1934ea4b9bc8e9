import math

import numpy as np
import pytest
from scipy import stats

from experiments.coverage import NOISES, simulate_coverage
from sparse_lm.scaling.statistics import (
    BETTER,
    DIVERGED,
    SAME,
    STRETCHES,
    WORSE,
    Noise,
    confidence_interval,
    judge_difference,
    mean,
    mean_interval,
    measure_noise,
    ratio_interval,
)


def test_the_interval_is_students():
    values = [2.1, 2.3, 1.9, 2.6]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values))
    assert confidence_interval(values) == pytest.approx((low, high), rel=1e-12)


def test_the_interval_of_two_is_12_706_half_distances():
    assert confidence_interval([1.0, 3.0]) == pytest.approx((2 - 12.7062047, 2 + 12.7062047))


def test_one_value_has_no_interval():
    assert confidence_interval([1.0]) is None


def test_twice_and_half_as_fast_make_once():
    center, (low, high) = ratio_interval([0.5, 2.0])
    assert center == pytest.approx(1) and low * high == pytest.approx(1)
    assert math.log(high) == pytest.approx(12.7062047 * math.log(2))


def slow_noise(losses, tokens, stretches):
    """The mean squares of a two-way layout without replication, term by term."""
    seeds, rows = losses.shape
    edges = [g * rows // stretches for g in range(stretches + 1)]
    part = lambda x, g: sum(x[r] for r in range(edges[g], edges[g + 1]))
    length = [part(tokens, g) for g in range(stretches)]
    loss = losses.sum() / (seeds * tokens.sum())
    x = [
        [(part(losses[s], g) - loss * length[g]) * stretches / sum(length) for g in range(stretches)]
        for s in range(seeds)
    ]
    of_seed = [sum(row) / stretches for row in x]
    of_stretch = [sum(x[s][g] for s in range(seeds)) / seeds for g in range(stretches)]
    seed_square = stretches * sum(v**2 for v in of_seed) / (seeds - 1)
    text_square = seeds * sum(v**2 for v in of_stretch) / (stretches - 1)
    left = sum((x[s][g] - of_seed[s] - of_stretch[g]) ** 2 for s in range(seeds) for g in range(stretches))
    left /= (seeds - 1) * (stretches - 1)
    return [math.sqrt(max(v, 0) / (seeds * stretches)) for v in (seed_square, text_square - left)]


@pytest.mark.parametrize("rows", [5, STRETCHES, 203])
def test_noise_is_that_of_the_slow_sums(rows):
    rng = np.random.default_rng(rows)
    tokens = rng.integers(1, 9, rows).astype(float)
    losses = (rng.normal(size=(3, 1)) + 2 * rng.normal(size=rows) + 0.1 * rng.normal(size=(3, rows))) * tokens
    found = measure_noise(losses, tokens)
    assert [found.seeds, found.text] == pytest.approx(slow_noise(losses, tokens, min(rows, STRETCHES)), rel=1e-9)


def test_without_noise_of_text_it_is_that_of_the_seeds():
    losses = np.array([[-0.10], [-0.11], [-0.09]]) * np.full(40, 7.0)
    noise = measure_noise(losses, np.full(40, 7.0))
    assert noise.text == pytest.approx(0, abs=1e-12) and noise.seeds == pytest.approx(0.01 / math.sqrt(3))
    assert mean_interval(-0.10, noise, 3, 40) == pytest.approx(confidence_interval([-0.10, -0.11, -0.09]))


def test_what_can_not_be_known_is_said():
    noise = measure_noise(np.array([[1.0, 2.0, 3.0]]), np.ones(3))  # one seed
    assert noise.seeds is None and noise.text == pytest.approx(1 / math.sqrt(3))
    assert mean_interval(2.0, noise, 1, 3) is None
    noise = measure_noise(np.array([[1.0], [3.0]]), np.ones(1))  # one row
    assert noise.text is None and mean_interval(2.0, noise, 2, 1) == pytest.approx(confidence_interval([1.0, 3.0]))


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("seeds", [2, 3, 10])
@pytest.mark.parametrize("rows", [64, 10_000])
def test_intervals_cover_as_stated(rows, seeds, noise):
    """The true mean, 0; and so a verdict where there is no difference is as rare as stated."""
    draws = 400 if rows > 64 else 2000
    covered = simulate_coverage(noise, seeds, rows, draws)
    # Three standard deviations of the count; an interval between two kinds of noise may be wide.
    spread = 3 * math.sqrt(0.95 * 0.05 / draws)
    assert covered > 0.95 - spread
    if noise in ("seeds", "text"):
        assert covered < 0.95 + spread


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([-0.1], "one seed: not judged"),
        ([-0.10, -0.11, -0.09], "better"),
        ([0.10, 0.11, 0.09], "worse"),
        ([-0.10, -0.11, 0.09], "no difference seen"),
        ([-0.1, -0.3], "no difference seen"),  # all lower, but two seeds say little
        ([0.0, 0.0, 0.0], "no difference seen"),
        # With three seeds the 95 % interval is the mean ± 2.484 deviations.
        ([0.14, 0.24, 0.34], "no difference seen"),
        ([0.16, 0.26, 0.36], "worse"),
    ],
)
def test_words_are_used_only_where_noise_allows(differences, word):
    assert judge_difference(mean(differences), confidence_interval(differences)) == word


def test_a_loss_that_is_not_finite_has_a_word_of_its_own():
    assert judge_difference(None, None) == DIVERGED


def test_noise_of_text_takes_a_verdict_back():
    seeds = Noise(seeds=0.005, text=0.0)
    assert judge_difference(-0.03, mean_interval(-0.03, seeds, 3, 64)) == BETTER
    assert judge_difference(0.03, mean_interval(0.03, seeds, 3, 64)) == WORSE
    assert judge_difference(-0.03, mean_interval(-0.03, Noise(seeds=0.005, text=0.011), 3, 64)) == SAME
