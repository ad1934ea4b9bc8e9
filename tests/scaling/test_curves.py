import math

import pytest

from sparse_lm.scaling.curves import first_crossing, loss_curve, speedup


def rows(losses, seconds=1.0):
    return [
        {"step": 10 * (i + 1), "split": split, "loss": loss, "seconds": seconds * 10 * (i + 1)}
        for i, loss in enumerate(losses)
        for split in ("validation", "other")
    ]


@pytest.mark.parametrize(
    ("loss", "target", "where"),
    [
        ([4.0, 3.0, 2.0], 2.5, 25.0),  # halfway between the second and the third
        ([4.0, 3.0, 2.0], 2.0, 30.0),
        ([4.0, 3.0, 2.0], 1.9, None),
        ([4.0, 3.0, 2.0], 5.0, 10.0),  # below it already at the first evaluation
        ([4.0, 2.0, 3.0, 1.0], 2.5, 17.5),  # the first time
        ([math.inf, 2.0], 2.5, 20.0),
        ([], 2.5, None),
    ],
)
def test_crossing_is_interpolated(loss, target, where):
    assert first_crossing([10.0 * (i + 1) for i in range(len(loss))], loss, target) == where


def test_curve_picks_a_split_in_the_order_of_steps():
    shuffled = list(reversed(rows([4.0, None, 2.0])))
    assert loss_curve(shuffled, "validation", "step") == ([10, 20, 30], [4.0, math.inf, 2.0])


def test_speedup_in_steps_and_seconds():
    slow, fast = rows([4.0, 3.0, 2.5, 2.25]), rows([3.25, 2.25, 2.0, 1.5], seconds=1.5)
    assert speedup(slow, fast, "validation", "step") == 2.0
    assert speedup(slow, fast, "validation", "seconds") == pytest.approx(2 / 1.5)


def test_no_speedup_where_the_loss_is_not_reached():
    assert speedup(rows([4.0, 2.0]), rows([4.0, 2.1]), "validation", "step") is None
    assert speedup(rows([4.0, None]), rows([4.0, 2.1]), "validation", "step") is None
    assert speedup([], rows([4.0]), "validation", "step") is None


def test_a_baseline_that_rose_again_is_credited_with_its_first_time():
    overfit, other = rows([4.0, 2.0, 1.0, 2.0]), rows([4.0, 3.0, 2.5, 2.0])
    assert speedup(overfit, other, "validation", "step") == 0.5
