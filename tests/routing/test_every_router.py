"""What holds of every router, from the table of them."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.experts import EXECUTORS
from sparse_lm.models import functional
from sparse_lm.models.context import Context
from sparse_lm.models.expert_layer import ExpertLayer
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS, ExpertChoice, SoftSlots, TokenChoice, leak
from sparse_lm.step.loss import packed_context
from tests import tiny
from tests.routing import table

G, S, D = 2, 16, 16
NAMES = sorted(ROUTERS)
IN_LAYER = [name for name in NAMES if not ROUTERS[name].skips_layers]
# `auto` is one of the others; with masks the others are compared.
PAIRS = [
    (name, executor)
    for name in IN_LAYER
    for executor in ("gather", "grouped")
    if ROUTERS[name].form in EXECUTORS[executor].forms
]


def test_the_table_has_every_router():
    assert set(table.TABLE) == set(ROUTERS)


@functools.cache
def router(name):
    """(state of the router, compiled route and route_alone, by parameters)"""
    made = create("model.router", ROUTERS, table.TABLE[name].router, table.config(name).model, nnx.Rngs(params=0))
    graph, state = nnx.split(made)
    parameters = nnx.to_pure_dict(state)
    merge = lambda parameters: nnx.merge(graph, nnx.State(parameters))
    route = jax.jit(lambda p, *args: merge(p).route(*args))
    alone = jax.jit(lambda p, *args: merge(p).route_alone(*args))
    return made, parameters, route, alone


KINDS = {
    "random": lambda random: random.normal(size=(G, S, D)),
    "equal": lambda random: np.zeros((G, S, D)),
    "ties": lambda random: np.repeat(random.normal(size=(G, 1, D)), S, axis=1),
    "extreme": lambda random: 1e18 * random.normal(size=(G, S, D)),
    "infinite": lambda random: np.where(random.random((G, S, D)) < 0.5, 3e38, -3e38),
}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_choices_are_valid_whatever_the_scores(name, data):
    """Of experts and tokens that exist, none twice, none for padding, and as many as the router says."""
    made, parameters, route, alone = router(name)
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = KINDS[data.draw(st.sampled_from(sorted(KINDS)))](random).astype(np.float32)
    valid = random.random((G, S)) < data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    ids = random.integers(0, 64, (G, S)).astype(np.int32)
    args = (parameters, x, ids, valid, made.init_state())
    key = None if data.draw(st.booleans()) else jax.random.key(0)
    check(made, route(*args, key).choice, valid)
    if not made.skips_layers:
        generated = alone(*args).choice
        assert isinstance(generated, TokenChoice | SoftSlots)
        check(made, generated, valid)


def check(made, choice, valid):
    everyone = valid.all()
    match choice:
        case TokenChoice(expert, weight):
            expert, weight = np.asarray(expert), np.asarray(weight)
            assert ((-1 <= expert) & (expert < made.experts)).all()
            assert (expert[~valid] == -1).all() and (weight[expert < 0] == 0).all()
            for row in expert.reshape(-1, expert.shape[-1]):
                named = row[row >= 0]
                assert len(set(named)) == len(named)
            if made.k_experts:
                assert ((expert >= 0).sum(axis=-1)[valid] == made.top_k).all()
        case ExpertChoice(token, weight):
            token, weight = np.asarray(token), np.asarray(weight)
            assert ((-1 <= token) & (token < valid.shape[1])).all() and (weight[token < 0] == 0).all()
            for group, of_group in zip(token, valid):
                for row in group:
                    named = row[row >= 0]
                    assert len(set(named)) == len(named) and of_group[named].all()
            if everyone:
                assert len(set((token >= 0).sum(axis=(0, 2)))) == 1
        case SoftSlots(dispatch, combine):
            dispatch, combine = np.asarray(dispatch), np.asarray(combine)
            assert (dispatch[~valid] == 0).all() and (combine[~valid] == 0).all()


@pytest.mark.parametrize("name", table.EVEN)
def test_an_even_router_gives_every_expert_the_same_number_of_tokens(name):
    made, parameters, route, _ = router(name)
    x = np.random.default_rng(0).normal(size=(G, S, D)).astype(np.float32)
    ids, valid = np.zeros((G, S), np.int32), np.ones((G, S), bool)
    load = route(parameters, x, ids, valid, made.init_state(), jax.random.key(0)).statistics["load"]
    np.testing.assert_allclose(load, load.mean(), rtol=1e-6)


@pytest.mark.parametrize("name, executor", PAIRS)
@pytest.mark.parametrize("factor", [0.5, math.inf])
def test_every_executor_that_takes_a_router_agrees_with_masks(name, executor, factor):
    """Values, what is dropped, losses, and gradients of input, router and experts."""
    tiny.close(layer(name, executor, factor), layer(name, "einsum", factor))


@functools.cache
def layer(name, executor, factor):
    model = table.config(name, executor=executor).model
    graph, state = nnx.split(ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)))
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, G, S, D)).astype(np.float32)
    valid = random.random((G, S)) < 0.8
    at = jnp.zeros((G, S), jnp.int32)
    ids = jnp.asarray(random.integers(0, 64, (G, S)), jnp.int32)
    context = Context(ids, jnp.asarray(valid, jnp.int32), at, factor)
    router_state = router(name)[0].init_state()

    def total(parameters, x):
        y, aux = nnx.merge(graph, nnx.State(parameters))(x, context, router_state, jax.random.key(1), None)
        return (y * dy).sum() + sum(aux.losses.values()), (y, aux.losses, aux.statistics)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(nnx.to_pure_dict(state), x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("factor", [1.0, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_a_router_leaks_where_it_says_so(name, factor, training):
    """Later tokens of a text are changed; earlier outputs change only where routing looks ahead, and do so there."""
    model = table.config(name).model
    fns = functional(model)
    run = _logits(name)
    parameters = jax.tree.map(lambda w: 2 * w, fns.init(jax.random.key(0)))
    key = jax.random.key(1) if training else None
    leaks = 0.0
    for seed in range(6):
        random = np.random.default_rng(seed)
        ids = random.integers(1, 64, (4, S)).astype(np.int32)
        other = np.concatenate([ids[:, : S // 2], random.integers(1, 64, (4, S // 2))], axis=1).astype(np.int32)
        ones, at = np.ones((4, S), np.int32), np.tile(np.arange(S, dtype=np.int32), (4, 1))
        first, second = (
            run(parameters, {"inputs": i, "segments": ones, "positions": at}, factor, key) for i in (ids, other)
        )
        leaks = max(leaks, float(np.abs(first - second)[:, : S // 2].max()))
    by_chance = name == "random" and training  # whatever the text
    if leak(model, factor, training) and not by_chance:
        assert leaks > 1e-3
    else:
        assert leaks < 1e-5


@functools.cache
def _logits(name):
    fns = functional(table.config(name).model)
    state = fns.init_router_state()

    def logits(parameters, batch, factor, key):
        return fns.apply(parameters, batch["inputs"], packed_context(batch, factor), state, key).logits

    return jax.jit(logits, static_argnums=2)


def test_the_classification_is_the_known_one():
    """In training, dropless where tokens choose."""
    ahead = {name for name in NAMES if leak(table.config(name).model, math.inf, training=True)}
    assert ahead == {"sinkhorn", "base", "expert_choice", "soft", "mixture_of_depths"}
    evaluated = {name for name in NAMES if leak(table.config(name).model, math.inf)}
    assert evaluated == {"expert_choice", "soft", "mixture_of_depths"}
    assert all(ROUTERS[name].in_generation for name in ahead)
    assert "lose their places" in leak(table.config("switch", router=configs.choice("topk", priority=True)).model, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_routing_gives_the_same_step(name):
    expected, found = replayed(name)
    tiny.close(found, expected, 1e-6)
    tiny.equal(found[2]["chosen"], expected[2]["chosen"])


def replayed(name):
    """A step, and the same with what it chose given to it: state, metrics and what was seen."""
    program = built(name)
    state, batch = program.init(), tiny.batch(program.config)
    step = program.record(state, batch)
    return step, program.record(state, batch, step[2]["chosen"])


@pytest.mark.bit_for_bit
@pytest.mark.parametrize("name", ["switch", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "switch")])
def test_a_recorded_routing_gives_the_same_step_bit_for_bit(name):
    tiny.equal(*replayed(name))


def built(name, **fields):
    of_model = vars(table.config(name, **fields).model)
    return tiny.built(**{f"model__{field}": value for field, value in of_model.items() if not field.startswith("_")})


@pytest.mark.parametrize("name", [name for name in NAMES if table.TABLE[name].one_expert is not None])
def test_one_expert_is_the_dense_model(name):
    program = built(name, **{"experts": 1, "top_k": 1, "capacity_factor": math.inf} | table.TABLE[name].one_expert)
    dense = tiny.built(model__experts=0)
    state, plain = program.init(), dense.init()
    batch = tiny.batch(program.config)
    for _ in range(3):
        state, metrics = program.step(state, batch)
        plain, expected = dense.step(plain, batch)
        tiny.close(metrics["cross_entropy"], expected["cross_entropy"], 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_router_trains_and_its_state_moves_in_training_alone(name):
    program = built(name)
    state, batch = program.init(), tiny.batch(program.config)
    before = jax.device_get(state.router)
    program.evaluate(state.parameters, state.router, batch)
    tiny.equal(jax.device_get(state.router), before)
    losses = []
    for _ in range(30):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["cross_entropy"]))
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.5
    assert int(state.skipped) == 0
    assert all(np.isfinite(value).all() for value in metrics["routing"].values())
    if before and name != "hash":  # whose state is a fixed table
        assert any(
            (a != b).any() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(state.router)))
        )


@pytest.mark.parametrize("name", ["topk", "quantile", "deepseek"])
def test_the_weight_of_one_expert_of_several_is_its_score(name):
    """A normalized weight would be 1, and the router would learn nothing."""
    choices = []
    for normalize in (True, False):
        model = table.config(name, router=configs.choice(name, normalize=normalize), top_k=1).model
        made = create("model.router", ROUTERS, model.router, model, nnx.Rngs(params=0))
        x = jax.random.normal(jax.random.key(0), (2, 16, model.width))
        ids, valid = jnp.zeros((2, 16), jnp.int32), jnp.ones((2, 16), bool)
        choices.append(made.route(x, ids, valid, made.init_state()).choice)
    tiny.equal(choices[0], choices[1])
    assert (choices[0].weight < 1).all()


@pytest.mark.parametrize("router", [configs.choice("noisy_topk"), configs.choice("hash", gate=True)])
def test_a_weight_that_is_always_1_is_refused(router):
    one = table.config(router.name, router=router, top_k=1).model
    with pytest.raises(UserError, match=f"model.top_k is 1, .* the router '{router.name}' .* must be above 1"):
        functional(one)
    functional(dataclasses.replace(one, experts=1))
