"""Learning rates over 100 steps, 10 of them warm-up, against formulas by hand."""

import math

import numpy as np
import pytest

from sparse_lm.config import choice
from sparse_lm.errors import UserError
from sparse_lm.step.schedules import schedule
from tests import tiny

PEAK, WARMUP, STEPS = 0.01, 10, 100


def rates(name, warmup=WARMUP, steps=STEPS, **options):
    config = tiny.config(
        optimizer__schedule=choice(name, **options),
        optimizer__learning_rate=PEAK,
        optimizer__warmup_steps=warmup,
        training__steps=steps,
    )
    made = schedule(config)
    return np.array([float(made(step)) for step in range(steps + 1)])


@pytest.mark.parametrize("name", ["cosine", "rsqrt", "wsd", "constant"])
def test_the_warm_up_is_linear_and_its_first_step_counts(name):
    found = rates(name)
    np.testing.assert_allclose(found[:WARMUP], [PEAK * (step + 1) / WARMUP for step in range(WARMUP)], rtol=1e-6)
    assert found[WARMUP] == pytest.approx(PEAK)
    assert found.max() == pytest.approx(PEAK)


@pytest.mark.parametrize("name", ["cosine", "rsqrt", "wsd", "constant"])
def test_without_warm_up_the_first_step_is_the_peak(name):
    found = rates(name, warmup=0)
    assert found[0] == pytest.approx(PEAK)
    assert np.isfinite(found).all() and (np.diff(found) <= 1e-9).all()


def test_cosine():
    expected = [PEAK * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 10) / 90))) for step in range(10, 101)]
    np.testing.assert_allclose(rates("cosine")[10:], expected, rtol=1e-5)
    assert rates("cosine", final=0.0)[100] == pytest.approx(0, abs=1e-9)
    assert rates("cosine", final=0.5)[100] == pytest.approx(PEAK / 2)


def test_rsqrt():
    np.testing.assert_allclose(rates("rsqrt")[10:], [PEAK * math.sqrt(10 / step) for step in range(10, 101)], rtol=1e-5)


def test_rsqrt_with_cooldown():
    found = rates("rsqrt", cooldown=0.2)
    falling = lambda step: PEAK * math.sqrt(10 / step)
    np.testing.assert_allclose(found[10:81], [falling(step) for step in range(10, 81)], rtol=1e-5)
    expected = [falling(step) * (100 - step) / 20 for step in range(80, 101)]
    np.testing.assert_allclose(found[80:], expected, rtol=1e-5, atol=1e-9)


def test_wsd():
    found = rates("wsd", decay=0.3, final=0.1)
    np.testing.assert_allclose(found[10:71], PEAK, rtol=1e-6)
    expected = [PEAK * (1 - 0.9 * (step - 70) / 30) for step in range(70, 101)]
    np.testing.assert_allclose(found[70:], expected, rtol=1e-5)


def test_constant():
    np.testing.assert_allclose(rates("constant")[10:], PEAK, rtol=1e-6)


@pytest.mark.parametrize("name, options", [("wsd", {"decay": 1.0}), ("rsqrt", {"cooldown": 1.0})])
def test_a_decay_as_long_as_the_run_begins_after_the_warm_up_and_still_ends_at_0(name, options):
    found = rates(name, **options)
    assert found[WARMUP] == pytest.approx(PEAK)
    assert found[STEPS] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name, options", [("wsd", {"decay": 0.5}), ("rsqrt", {"cooldown": 0.5})])
@pytest.mark.parametrize("steps", [25, 99])
def test_a_decay_of_half_an_odd_number_of_steps_ends_with_the_run(name, options, steps):
    found = rates(name, warmup=2, steps=steps, **options)
    assert found[steps] == pytest.approx(0, abs=1e-9)
    assert found[steps - 1] > 0


@pytest.mark.parametrize(
    "name, option, value", [("wsd", "decay", 1.5), ("wsd", "decay", -0.1), ("rsqrt", "cooldown", 2.0)]
)
def test_a_share_is_between_0_and_1(name, option, value):
    with pytest.raises(UserError, match=f"optimizer.schedule.options.{option} is {value}"):
        rates(name, **{option: value})


@pytest.mark.parametrize("name", ["cosine", "rsqrt", "wsd", "constant"])
def test_a_run_of_one_step_learns(name):
    assert rates(name, warmup=0, steps=1)[0] == pytest.approx(PEAK)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="optimizer.warmup_steps is 100; it must be below training.steps=100"):
        rates("cosine", warmup=100)
    with pytest.raises(UserError, match="optimizer.schedule.name is 'cosin'.* did you mean 'cosine'"):
        rates("cosin")
