"""The expert layer as a whole: route, place, compute, combine; values and gradients against the loop."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.experts import EXECUTORS
from sparse_lm.experts.executor import Executor
from sparse_lm.experts.gather import gather
from sparse_lm.models.context import Context
from sparse_lm.models.expert_layer import ExpertLayer
from sparse_lm.models.layer import Layer, RMSNorm
from sparse_lm.stack import decoder_stack
from tests import tiny
from tests.oracles import moe

ROWS, LENGTH, D, E = 2, 16, 16, 4


def context(valid, factor):
    zeros = jnp.zeros((ROWS, LENGTH), jnp.int32)
    return Context(zeros, jnp.asarray(valid, jnp.int32), zeros, factor)


def layer(executor, **fields):
    model = tiny.config(
        model__experts=E,
        model__executor=executor,
        model__expert_width=6,
        model__router=tiny.switch(balance_loss=0.3, z_loss=0.2),
        training__batch=ROWS,
        **fields,
    ).model
    graph, state = nnx.split(ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)))
    # Larger weights than at the start, so that no gradient drowns in another's rounding.
    return graph, jax.tree.map(lambda w: 3 * w, nnx.to_pure_dict(state))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "activation, factor, group",
    [("gelu", 1.0, 8), ("geglu", 0.5, 16), ("swiglu", 0.5, 16), ("gelu", float("inf"), 8), ("gelu", 2.0, 32)],
)
def test_a_switch_layer_is_the_loop_in_values_and_gradients(executor, activation, factor, group):
    graph, parameters = layer(executor, model__activation=activation, model__group_size=group)
    random = np.random.default_rng(group)
    x, dy = random.normal(size=(2, ROWS, LENGTH, D))
    valid = random.random((ROWS, LENGTH)) < 0.8

    @jax.jit
    def run(parameters, x):
        def total(parameters, x):
            y, aux = nnx.merge(graph, nnx.State(parameters))(x, context(valid, factor), {}, None, None)
            return (y * dy).sum() + sum(aux.losses.values()), (y, aux)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(parameters, x)

    (_, (y, aux)), (found, dx) = run(parameters, x.astype(np.float32))

    grouped = lambda a: a.reshape(-1, group, *a.shape[2:])
    wide = jax.tree.map(lambda w: np.asarray(w, np.float64), parameters)
    places = moe.capacity(group, E, 1, factor)
    expected, losses, expert, lost, gradients = moe.switch(
        grouped(x), grouped(valid), wide["router"]["kernel"], wide["experts"], activation, places, 0.3, 0.2, grouped(dy)
    )
    np.testing.assert_array_equal(aux.chosen, expert)
    assert aux.statistics["dropped"] == lost
    assert (lost > 0) == (factor <= 1)
    tiny.close(grouped(np.asarray(y)), expected)
    tiny.close(jax.tree.map(np.asarray, aux.losses), losses)
    tiny.close(grouped(np.asarray(dx)), gradients["x"])
    tiny.close(found["router"]["kernel"], gradients["router"])
    tiny.close(found["experts"], gradients["experts"])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_overflow_and_padding_pass_a_layer_by_the_residual_alone(executor):
    """With attention switched off, a token without a place leaves the layer as it came."""
    model = tiny.config(
        model__experts=E, model__executor=executor, model__router=tiny.switch(), training__batch=ROWS
    ).model
    made = Layer(model, decoder_stack(model).period[-1], nnx.Rngs(params=0))
    made.attention.out[...] = jnp.zeros_like(made.attention.out[...])
    graph, state = nnx.split(made)
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, LENGTH, D)).astype(np.float32)
    valid = random.random((ROWS, LENGTH)) < 0.8
    y, (aux, _) = jax.jit(lambda x: nnx.merge(graph, state)(x, context(valid, 0.5), {}))(x)
    kept = np.stack([moe.place(group, moe.capacity(LENGTH, E, 1, 0.5)) for group in np.asarray(aux.chosen)])[..., 0]
    assert 0 < kept.sum() < valid.sum()
    np.testing.assert_array_equal(np.asarray(y)[~kept], x[~kept])
    assert (np.asarray(y) != x).any(axis=-1)[kept].all()


def test_what_overflows_a_buffer_in_training_is_kept_outside_it():
    """On one device nothing overflows; that the buffer is one of training alone is what is asked."""
    model = tiny.config(model__experts=E, model__exchange_buffer=1.0, training__batch=ROWS).model
    asked = []

    def executor(x, choice, experts, capacity):
        asked.append(experts.buffer)
        return x, jnp.zeros(())

    made = ExpertLayer(model, model.expert_width, nnx.Rngs(params=0))
    x, valid = jnp.ones((ROWS, LENGTH, D)), np.ones((ROWS, LENGTH), bool)
    original = EXECUTORS["auto"]
    EXECUTORS["auto"] = original._replace(run=executor)
    try:
        for key in (None, jax.random.key(0)):
            made(x, context(valid, math.inf), {}, key, None)
    finally:
        EXECUTORS["auto"] = original
    assert asked == [math.inf, 1.0]


def test_rms_norm():
    random = np.random.default_rng(0)
    x, scale = random.normal(size=(2, 3, D)), random.normal(size=D)
    norm = RMSNorm(D)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    expected = [[v / np.sqrt((v**2).sum() / D + 1e-6) * scale for v in row] for row in x]
    tiny.close(norm(jnp.asarray(x, jnp.float32)), np.array(expected))
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_alone_a_token_passes_the_experts_that_it_chooses(monkeypatch):
    """Where experts choose, in training as many as there are; in generation top_k, by which `auto` goes."""
    model = tiny.config(model__experts=E, model__top_k=2, model__router=configs.choice("expert_choice")).model
    made, passed = ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)), []

    def run(x, choice, experts, capacity):
        passed.append(experts.passed)
        return gather.run(x, choice, experts, capacity)

    monkeypatch.setitem(EXECUTORS, "auto", Executor(run, ()))
    for alone in (False, True):
        of = context(np.ones((ROWS, LENGTH), bool), math.inf)._replace(alone=alone)
        made(jnp.ones((ROWS, LENGTH, D)), of, {}, None, None)
    assert passed == [E, 2]
