"""A layer that tokens skip, against the same layer applied to the chosen tokens alone, row by row."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.errors import UserError
from sparse_lm.mesh import make_mesh
from sparse_lm.models import functional
from sparse_lm.models.context import Context
from sparse_lm.models.depth import SkippedLayer
from sparse_lm.serving.generate import cached_logits
from sparse_lm.stack import decoder_stack
from sparse_lm.step.build import build
from tests import tiny

ROWS, LENGTH, D, C = 3, 16, 16, 4
DEPTH = {
    "model__experts": 1,
    "model__router": configs.choice("mixture_of_depths"),
    "model__capacity_factor": C / LENGTH,
}


def made():
    model = tiny.config(**DEPTH, training__batch=ROWS).model
    layer = SkippedLayer(model, decoder_stack(model).period[-1], nnx.Rngs(params=0))
    layer.router.kernel[...] *= 3
    return layer


def context(valid):
    at = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
    return Context(jnp.zeros((ROWS, LENGTH), jnp.int32), jnp.asarray(valid, jnp.int32), at, math.inf)


@pytest.mark.parametrize("padding", [(0, 0, 0), (3, 14, 16)])
def test_the_chosen_tokens_pass_and_the_others_leave_as_they_came(padding):
    layer = made()
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)
    valid = np.arange(LENGTH) < LENGTH - np.array(padding)[:, None]
    graph, state = nnx.split(layer)
    y, (aux, _) = jax.jit(lambda x: nnx.merge(graph, state)(x, context(valid)))(x)
    for row in range(ROWS):
        score = x[row].astype(np.float64) @ np.asarray(layer.router.kernel[...], np.float64)[:, 0]
        best = [t for t in np.argsort(-score) if valid[row, t]][:C]
        chosen, n = sorted(best), len(best)
        assert [t for t in np.asarray(aux.chosen)[row, 0] if t >= 0] == chosen
        expected = x[row].copy()
        if chosen:
            alone = Context(
                jnp.zeros((1, n), jnp.int32),
                jnp.ones((1, n), jnp.int32),
                jnp.asarray(chosen)[None],
                math.inf,
            )
            inside = layer.layer(jnp.asarray(x[row, chosen])[None], alone)[0][0]
            expected[chosen] += score[chosen, None] * (inside - x[row, chosen])
        tiny.close(np.asarray(y)[row], expected)
    assert aux.statistics["load"] == sum(min(C, LENGTH - p) for p in padding)


def test_tokens_that_are_routed_alone_do_not_see_later_ones():
    layer, valid = made(), np.ones((ROWS, LENGTH), bool)
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, D)).astype(np.float32)
    alone = context(valid)._replace(alone=True, cache_start=jnp.zeros(ROWS, jnp.int32))
    y, (aux, cache) = layer(jnp.asarray(x), alone)
    assert cache is None and 0 < (aux.chosen >= 0).sum() < ROWS * LENGTH
    later, _ = layer(jnp.asarray(x).at[:, 8:].set(1), alone)
    tiny.equal(later[:, :8], y[:, :8])
    cached, _ = layer(jnp.asarray(x), alone, cache=layer.init_cache(ROWS, LENGTH))
    tiny.close(cached, y)


def test_the_router_learns_to_tell_the_chosen_from_the_others():
    program = tiny.built(**DEPTH, optimizer__learning_rate=0.02)
    state = program.init()
    batch = tiny.batch(program.config)
    for _ in range(40):
        state, metrics = program.step(state, batch)
        first = metrics if int(state.step) == 1 else first
    assert metrics["cross_entropy"] < first["cross_entropy"] - 0.5
    assert metrics["predictor_loss"] < 0.8 * first["predictor_loss"]


def test_generation_with_a_cache_is_the_pass_without_one():
    """Token by token and all at once, each token being routed by itself."""
    model = tiny.config(**DEPTH).model
    fns = functional(model)
    parameters = fns.init(jax.random.key(0))
    ids = np.random.default_rng(0).integers(1, 64, (2, LENGTH))
    run = jax.jit(lambda *a: cached_logits(fns, parameters, {}, *a), static_argnums=())
    pair = lambda number: jnp.full(2, number, jnp.int32)
    whole, _ = run(fns.init_caches(2, LENGTH), jnp.asarray(ids), pair(0), pair(LENGTH))
    caches, logits = fns.init_caches(2, LENGTH), []
    for at in range(LENGTH):
        one, caches = run(caches, jnp.asarray(ids[:, at : at + 1]), pair(at), pair(1))
        logits.append(one)
    tiny.close(jnp.concatenate(logits, axis=1), whole)


def test_the_twin_has_the_layers_that_every_token_passes_at_equal_flops():
    config = tiny.config(**DEPTH, model__layers=4)
    twin = cost.dense_twin(config)
    assert (twin.model.experts, twin.model.layers) == (0, 2)
    sparse, dense = (cost.count_flops(c.model, LENGTH) for c in (config, twin))
    one_unit = 2 * 3 * 2 * 2 * config.model.width  # of hidden width, in both layers
    assert abs(sparse.training - sparse.router - dense.training) <= one_unit / 2
    leaves = jax.tree.leaves(jax.eval_shape(functional(config.model).init, jax.random.key(0)))
    assert cost.count_parameters(config.model).total == sum(leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model__experts": 4}, "model.experts is 4 .* has 1 layer to send tokens to"),
        ({"model__capacity_factor": 1.25}, "model.capacity_factor is 1.25; .* at most 1"),
        ({"model__group_size": 8}, "model.group_size is 8; .* must be 0"),
        ({"model__shared_experts": 1}, "model.shared_experts is 1"),
        ({"model__executor": "grouped"}, "model.executor 'grouped'"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    config = tiny.config(**DEPTH | fields)
    with pytest.raises(UserError, match=words):
        build(config, make_mesh(config.mesh, jax.devices()[:1]))


def test_a_twin_needs_layers_that_every_token_passes():
    with pytest.raises(UserError, match="model.expert_every is 1"):
        cost.dense_twin(tiny.config(**DEPTH, model__expert_every=1))
