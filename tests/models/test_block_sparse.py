"""A feed-forward layer whose matrices are made of blocks, from its config to its twin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.errors import UserError
from sparse_lm.layouts import build_layout
from sparse_lm.mesh import make_mesh
from sparse_lm.models import functional
from sparse_lm.models.block_sparse import BlockSparse
from sparse_lm.models.feed_forward import FeedForward
from sparse_lm.step.build import build
from tests import tiny

LAYOUT = configs.choice("small_world", density=0.25, block=4)
FIELDS = {"model__layout": LAYOUT, "model__expert_width": 64}


def whole(blocks, of):
    """The matrix with 0 where there is no block, block by block."""
    matrix = np.zeros((of.width_in, of.width_out))
    for block, row, column in zip(np.asarray(blocks, np.float64), of.rows, of.columns, strict=True):
        matrix[row * of.block : (row + 1) * of.block, column * of.block : (column + 1) * of.block] = block
    return matrix


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_layer_is_the_dense_one_with_zeros(activation):
    model = tiny.config(**FIELDS, model__activation=activation).model
    sparse = BlockSparse(model, 64, nnx.Rngs(params=0))
    dense = FeedForward(model, 64, nnx.Rngs(params=0))
    for name in ("into", "gate", "out"):
        if (parameter := getattr(sparse, name)) is not None:
            of = build_layout(LAYOUT, *((64, 16) if name == "out" else (16, 64)), "model.layout")
            getattr(dense, name)[...] = jnp.asarray(whole(parameter[...], of), jnp.float32)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    tiny.close(sparse(x)[0], np.asarray(dense(x)[0]))


def test_a_unit_starts_with_the_variance_of_a_dense_one():
    blocks = configs.choice("random", density=0.25, block=32)
    model = tiny.config(model__width=256, model__expert_width=1024, model__layout=blocks).model
    made = BlockSparse(model, 1024, nnx.Rngs(params=0))
    assert float(made.into[...].std()) == pytest.approx((1 / 64) ** 0.5, rel=0.02)


def test_it_trains_beside_a_twin_of_equal_flops():
    config = tiny.config(**FIELDS)
    twin = cost.dense_twin(config)
    assert (twin.model.layout.name, twin.model.expert_width) == ("dense", 16)
    sparse, dense = (cost.count_flops(c.model, c.data.length).training for c in (config, twin))
    assert sparse == dense
    assert cost.count_parameters(config.model).total == cost.count_parameters(twin.model).total
    leaves = jax.tree.leaves(jax.eval_shape(functional(config.model).init, jax.random.key(0)))
    assert cost.count_parameters(config.model).total == sum(leaf.size for leaf in leaves)
    program = tiny.built(**FIELDS)
    state, batch = program.init(), tiny.batch(program.config)
    losses = []
    for _ in range(20):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("algorithm", ["adafactor", "muon"])
def test_optimizer_memory_shrinks_with_the_density(algorithm):
    fields = {"model__width": 512, "model__expert_width": 1024, "optimizer__algorithm": configs.choice(algorithm)}
    half, quarter = (
        cost.compute_memory(tiny.config(**fields, model__layout=configs.choice("random", density=d, block=128)))
        for d in (0.5, 0.25)
    )
    assert quarter.optimizer < half.optimizer and quarter.parameters < half.parameters


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model__layout": configs.choice("small_wrld")}, "did you mean 'small_world'"),
        ({"model__layout": configs.choice("banded", block=5)}, "model.layout.options.block is 5, .* nearest .* is 4"),
        ({"model__layout": configs.choice("banded", block=4, density=0.01)}, "density is 0.01"),
        ({"model__layout": LAYOUT, "model__experts": 4}, "model.experts must be 0"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        functional(tiny.config(**FIELDS | fields).model)


def test_fsdp_divides_what_is_stored_of_each_block():
    config = tiny.config(**FIELDS, model__width=32, training__batch=8)
    made = build(config, make_mesh(configs.Mesh(data=2, fsdp=4), jax.devices()[:1] * 8))
    into = made.abstract_state.parameters["period"][1]["feed_forward"]["into"]
    assert into.shape[-3:] == (32, 4, 4) and into.sharding.shard_shape(into.shape)[-3:] == (32, 1, 4)
    whole, local = (
        cost.compute_memory(config).optimizer,
        cost.compute_memory(config, configs.Mesh(data=2, fsdp=4)).optimizer,
    )
    assert local < 0.4 * whole
    with pytest.raises(UserError, match="model.layout.options.block is 4, which mesh.fsdp=8 does not divide"):
        build(config, make_mesh(configs.Mesh(data=1, fsdp=8), jax.devices()[:1] * 8))
