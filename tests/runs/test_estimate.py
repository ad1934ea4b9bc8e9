"""The estimate of a run's time grows with its work."""

from sparse_lm.cost import step_flops
from sparse_lm.runs import estimate
from tests import tiny


def test_the_estimate_is_the_executed_flops_over_the_speed(monkeypatch):
    monkeypatch.setattr(estimate, "_product_speed", lambda dtype: 1e9)
    small, large = tiny.config(), tiny.config(model__layers=8)
    for config in (small, large):
        assert estimate.seconds_per_step(config) == step_flops(config, "cpu") / (0.3 * 1e9)


def test_products_are_timed():
    assert 1e8 < estimate._product_speed("float32") < 1e16
