"""Means over seeds, their confidence intervals, and verdicts on differences."""

import math
from collections.abc import Sequence

from scipy import stats

BETTER, WORSE, SAME = "better", "worse", "no difference seen"
NOT_JUDGED = "one seed: not judged"
NOT_RANKED = "not ranked"
DIVERGED = "not judged: a loss is not finite"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Computes Student's t-interval (low, high) of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    center = mean(values)
    deviation = math.sqrt(sum((v - center) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return center - half, center + half


def verdict(differences: Sequence[float]) -> str:
    """Judges a loss by its differences from the baseline's, one per seed: `BETTER` or `WORSE` only if the 95 % interval
    of the mean difference excludes 0."""
    if not all(map(math.isfinite, differences)):
        return DIVERGED
    if (bounds := confidence_interval(differences)) is None:
        return NOT_JUDGED
    low, high = bounds
    return BETTER if high < 0 else WORSE if low > 0 else SAME
