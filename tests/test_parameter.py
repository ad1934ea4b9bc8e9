import jax
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models import functional
from sparse_lm.parameter import init_matrix, init_ones
from tests import tiny


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_matrix_is_a_truncated_normal_of_variance_scale_over_fan_in(scale):
    values = np.asarray(init_matrix(nnx.Rngs(params=0), (400, 500), ("width", "hidden"), fan_in=400, scale=scale)[...])
    deviation = (scale / 400) ** 0.5
    assert values.std() == pytest.approx(deviation, rel=0.01)
    assert values.mean() == pytest.approx(0, abs=0.01 * deviation)
    # Cut off at two deviations of the normal distribution, whose own deviation is larger than what remains.
    assert np.abs(values).max() == pytest.approx(2 * deviation / 0.8796, rel=0.01)


def test_axes_travel_with_parameters():
    config = tiny.config(model__experts=4, model__layers=5, model__dense_first=1, model__activation="swiglu")
    fns = functional(config.model)
    shapes = jax.eval_shape(fns.init, jax.random.key(0))
    named = jax.tree.map(lambda axes, leaf: dict(zip(axes, leaf.shape, strict=True)), fns.axes, shapes, is_leaf=is_axes)
    expert_layer = named["period"][1]
    assert expert_layer["feed_forward"]["experts"]["out"] == {"layers": 2, "experts": 4, "hidden": 32, "width": 16}
    assert expert_layer["feed_forward"]["router"]["kernel"] == {"layers": 2, "width": 16, "router_experts": 4}
    assert expert_layer["attention"]["key"] == {"layers": 2, "width": 16, "heads": 2, "head_width": 4}
    assert named["prefix"][0]["feed_forward"]["gate"] == {"width": 16, "hidden": 32}
    assert named["embedding"] == {"vocabulary": 64, "table_width": 16}
    assert named["norm"]["scale"] == {"norm": 16}
    assert init_ones((3,), ("norm",)).get_metadata("axes") == ("norm",)


def test_every_matrix_starts_with_the_deviation_of_its_fan_in():
    config = tiny.config(
        model__experts=4, model__width=64, model__ffn_width=96, model__init_scale=0.25, model__tied_embeddings=False
    )
    fns = functional(config.model)
    parameters = jax.jit(fns.init)(jax.random.key(0))
    layer = parameters["period"][1]
    for weights, fan_in, scale in [
        (layer["attention"]["query"], 64, 0.25),
        (layer["attention"]["out"], 64, 0.25),
        (layer["feed_forward"]["experts"]["into"], 64, 0.25),
        (layer["feed_forward"]["experts"]["out"], 96, 0.25),
        (layer["feed_forward"]["router"]["kernel"], 64, 0.25),
        (parameters["embedding"], 64, 1.0),
        (parameters["output"], 64, 0.25),
    ]:
        assert np.std(weights) == pytest.approx((scale / fan_in) ** 0.5, rel=0.15)


def test_layers_and_experts_start_with_different_weights():
    config = tiny.config(model__experts=4, model__layers=4)
    into = jax.jit(functional(config.model).init)(jax.random.key(0))["period"][1]["feed_forward"]["experts"]["into"]
    flat = np.asarray(into).reshape(8, -1)
    assert len(np.unique(flat, axis=0)) == 8


def is_axes(value):
    return isinstance(value, tuple)
