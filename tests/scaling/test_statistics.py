import math

import pytest
from scipy import stats

from sparse_lm.scaling.statistics import DIVERGED, confidence_interval, mean, verdict


def test_the_interval_is_students():
    values = [2.1, 2.3, 1.9, 2.6]
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean(values), scale=stats.sem(values))
    assert confidence_interval(values) == pytest.approx((low, high), rel=1e-12)


def test_the_interval_of_two_is_12_706_half_distances():
    assert confidence_interval([1.0, 3.0]) == pytest.approx((2 - 12.7062047, 2 + 12.7062047))


def test_one_value_has_no_interval():
    assert confidence_interval([1.0]) is None


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
        ([math.nan, 0.1], DIVERGED),
        ([math.nan], DIVERGED),
    ],
)
def test_words_are_used_only_where_noise_allows(differences, word):
    assert verdict(differences) == word
