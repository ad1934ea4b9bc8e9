"""Every executor against the loop, values and gradients, and against masks where a router's scores are extreme."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparse_lm.experts import EXECUTORS, Experts
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS, ExpertChoice, SoftSlots, TokenChoice
from sparse_lm.routing.router import LearnedRouter
from tests import tiny
from tests.oracles import moe
from tests.routing import table

G, S, D, E, F = 2, 10, 6, 4, 5


def make_experts(weights, activation):
    """What the executors are given."""
    into, out = ("experts", None, "hidden"), ("experts", "hidden", None)
    return Experts(weights, {"into": into, "gate": into, "out": out}, activation)


def case(top_k: int, gated: bool, crowded: bool):
    random = np.random.default_rng(10 * top_k + gated)
    weights = {"into": random.normal(size=(E, D, F)), "out": random.normal(size=(E, F, D))}
    if gated:
        weights["gate"] = random.normal(size=(E, D, F))
    order = np.argsort(random.normal(size=(G, S, E)) - (2 * np.eye(E)[1] if crowded else 0), axis=-1)
    expert = order[..., :top_k]
    expert[random.random((G, S)) < 0.2] = -1  # padding at random places
    expert[0, 3, -1] = -1  # and one choice left empty
    x, dy = random.normal(size=(2, G, S, D))
    return x, dy, expert, random.random(size=expert.shape), weights


CASES = [(1, 3, False), (1, S, True), (2, 1, False), (2, 4, True), (2, S, False)]  # choices, places (S: all), gated


@functools.cache
def program(executor: str, places: int, gated: bool):
    """(y, dropped, gradients of x, weight and weights); one for all choices, so that hypothesis does not compile."""

    @jax.jit
    def run(x, expert, weight, weights, dy):
        def go(x, weight, weights):
            made = make_experts(weights, "swiglu" if gated else "gelu")
            return EXECUTORS[executor].run(x, TokenChoice(expert, weight), made, places)

        y, vjp, dropped = jax.vjp(go, x, weight, weights, has_aux=True)
        return y, dropped, vjp(dy)

    to32 = lambda a: jnp.asarray(a, jnp.int32 if a.dtype.kind == "i" else jnp.float32)
    return lambda *args: run(*jax.tree.map(to32, args))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("top_k, places, gated", CASES)
def test_values_and_gradients_are_those_of_the_loop(executor, top_k, places, gated):
    x, dy, expert, weight, weights = case(top_k, gated, crowded=places < S)
    y, expected_dropped, *expected = moe.experts(x, expert, weight, weights, "swiglu" if gated else "gelu", places, dy)
    assert (expected_dropped > 0) == (places < S)
    found, dropped, gradients = program(executor, places, gated)(x, expert, weight, weights, dy)
    tiny.close(found, y)
    assert dropped == expected_dropped
    tiny.close(gradients, tuple(expected))


@st.composite
def routings(draw):
    """A case with choices of any kind, an expert named once by a token, and with weights of any size."""
    top_k, places, gated = draw(st.sampled_from(CASES))
    some = lambda values: arrays(np.int64, (G, S, top_k), elements=values)
    expert = draw(some(st.integers(-1, E - 1)) | st.integers(-1, E - 1).flatmap(lambda e: some(st.just(e))))
    expert[..., 1:][expert[..., 1:] == expert[..., :1]] = -1
    weight = draw(arrays(np.float64, expert.shape, elements=st.sampled_from([0.0, 1e-20, 0.3, 1.0, 1e20])))
    return places, gated, expert, weight


@pytest.mark.parametrize("executor", [name for name in EXECUTORS if name != "auto"])  # which is one of the others
@settings(max_examples=40, deadline=None)
@given(routings())
def test_any_choice_gives_values_and_gradients_of_the_loop(executor, routing):
    places, gated, expert, weight = routing
    x, dy, _, _, weights = case(1, gated, crowded=False)
    y, expected_dropped, *expected = moe.experts(x, expert, weight, weights, "swiglu" if gated else "gelu", places, dy)
    found, dropped, gradients = jax.device_get(program(executor, places, gated)(x, expert, weight, weights, dy))
    assert dropped == expected_dropped
    (dx, dweight, dweights), (ex, eweight, eweights) = gradients, expected
    tiny.close(dweight, eweight)  # in which weights have no part
    # By token and by expert, so that huge weights do not hide the small ones beside them.
    for g, s in np.ndindex(G, S):
        tiny.close((found[g, s], dx[g, s]), (y[g, s], ex[g, s]), 2e-4)
    for e in range(E):
        of_expert = lambda tree: {name: w[e] for name, w in tree.items()}
        tiny.close(of_expert(dweights), of_expert(eweights), 2e-4)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_token_without_a_place_has_output_zero_and_the_others_what_they_had(executor):
    x, _, expert, weight, weights = case(1, False, crowded=True)
    choice = TokenChoice(jnp.asarray(expert), jnp.asarray(weight, jnp.float32))
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    apply = lambda x, places: EXECUTORS[executor].run(x, choice, make_experts(weights, "gelu"), places)[0]
    run = jax.jit(apply, static_argnums=1)
    few, all_of_them = np.asarray(run(x.astype(np.float32), 2)), np.asarray(run(x.astype(np.float32), S))
    kept = np.stack([moe.place(group, 2) for group in expert])[..., 0]
    assert not few[~kept].any()
    assert all_of_them[(expert[..., 0] >= 0)].any(axis=-1).all()
    tiny.close(few[kept], all_of_them[kept])


def test_a_token_that_many_experts_choose_is_summed_in_float32():
    """In bfloat16 `gather` is no further from float32 than masks are, in the output and in the gradient of x."""
    count, tokens = 64, 8
    random = np.random.default_rng(0)
    into, out = random.normal(size=(count, D, F)) / D**0.5, random.normal(size=(count, F, D)) / F**0.5
    token = jnp.broadcast_to(jnp.arange(tokens), (1, count, tokens))
    weight = jnp.asarray(random.random(token.shape), jnp.float32)
    x, dy = random.normal(size=(2, 1, tokens, D))

    def run(executor, dtype):
        made = make_experts({"into": jnp.asarray(into, dtype), "out": jnp.asarray(out, dtype)}, "gelu")
        go = lambda x: EXECUTORS[executor].run(x, ExpertChoice(token, weight), made, tokens)[0]
        y, vjp = jax.vjp(go, jnp.asarray(x, dtype))
        return [np.asarray(a, np.float64) for a in (y, *vjp(jnp.asarray(dy, dtype)))]

    exact = run("einsum", "float32")
    error = lambda of: [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(of, exact)]
    for gathered, masked in zip(error(run("gather", "bfloat16")), error(run("einsum", "bfloat16"))):
        assert gathered < 1.1 * masked


SCORES = {
    "equal": [0.0],
    "extreme": [0.0, 1e30, -1e30],
    "infinite": [0.0, 1.0, np.inf, -np.inf],
    "all infinite": [np.inf],
    "none at all": [-np.inf],
}
LEARNED = [
    name
    for name, router in sorted(ROUTERS.items())
    if issubclass(router, LearnedRouter) and router.form is not SoftSlots and not router.skips_layers
]


@functools.cache
def router(name: str):
    """A router's choice from logits that are given to it."""
    model = table.config(name).model
    made = create("model.router", ROUTERS, model.router, model, nnx.Rngs(params=0))
    x, ids, valid = jnp.ones((G, S, model.width)), jnp.zeros((G, S), jnp.int32), jnp.ones((G, S), bool)
    valid = valid.at[0, 7:].set(False)

    def choose(logits):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(made), "logits", lambda *_: logits)
            return made.route(x, ids, valid, made.init_state()).choice

    return jax.jit(choose)


@functools.cache
def runner(executor: str):
    random = np.random.default_rng(1)
    into, out = random.normal(size=(table.E, D, F)), random.normal(size=(table.E, F, D))
    made = make_experts({"into": jnp.asarray(into, jnp.float32), "out": jnp.asarray(out, jnp.float32)}, "gelu")
    return jax.jit(lambda x, choice: EXECUTORS[executor].run(x, choice, made, 2))


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("name", LEARNED)
def test_extreme_scores_are_run_as_masks_run_them(name, scores):
    """Where a weight is no number, neither is what masks make of it; elsewhere all outputs are the same numbers."""
    random = np.random.default_rng(0)
    choice = router(name)(random.choice(SCORES[scores], (G, S, table.E)).astype(np.float32))
    x = random.normal(size=(G, S, D)).astype(np.float32)
    expected, expected_dropped = jax.device_get(runner("einsum")(x, choice))
    fine = np.isfinite(expected)
    for executor in ("gather", "grouped"):
        if type(choice) in EXECUTORS[executor].forms:
            y, dropped = jax.device_get(runner(executor)(x, choice))
            assert dropped == expected_dropped
            tiny.close(np.where(fine, y, 0), np.where(fine, expected, 0))
    assert fine.all() or "infinite" in scores or "none" in scores
