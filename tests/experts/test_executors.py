"""Every executor against the loop, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.experts import EXECUTORS, Experts
from sparse_lm.routing import TokenChoice
from tests import tiny
from tests.oracles import moe

G, S, D, E, F = 2, 10, 6, 4, 5
ACT = {"gelu": jax.nn.gelu, "swiglu": jax.nn.silu}


def experts(weights, activation):
    """What the executors are given."""

    def layer(x, product, key):
        hidden = product(x, "into")
        hidden = ACT[activation](product(x, "gate")) * hidden if "gate" in weights else ACT[activation](hidden)
        return product(hidden, "out")

    into, out = ("experts", None, "hidden"), ("experts", "hidden", None)
    return Experts(weights, {"into": into, "gate": into, "out": out}, layer)


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


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "top_k, places, gated", [(1, 3, False), (1, S, True), (2, 1, False), (2, 4, True), (2, S, False)]
)
def test_values_and_gradients_are_those_of_the_loop(executor, top_k, places, gated):
    x, dy, expert, weight, weights = case(top_k, gated, crowded=places < S)
    activation = "swiglu" if gated else "gelu"
    y, lost, *expected = moe.experts(x, expert, weight, weights, activation, places, dy)
    assert (lost > 0) == (places < S)

    @jax.jit
    def run(x, weight, weights):
        choice = TokenChoice(jnp.asarray(expert, jnp.int32), weight)
        go = lambda x, w, e: EXECUTORS[executor].run(x, choice._replace(weight=w), experts(e, activation), places)
        y, back, lost = jax.vjp(go, x, weight, weights, has_aux=True)
        return y, lost, back(dy.astype(np.float32))

    to32 = lambda tree: jax.tree.map(lambda a: a.astype(np.float32), tree)
    found, dropped, gradients = run(*to32((x, weight, weights)))
    tiny.close(found, y)
    assert dropped == lost
    tiny.close(gradients, tuple(expected))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_token_without_a_place_has_output_zero_and_the_others_what_they_had(executor):
    x, _, expert, weight, weights = case(1, False, crowded=True)
    choice = TokenChoice(jnp.asarray(expert), jnp.asarray(weight, jnp.float32))
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    apply = lambda x, places: EXECUTORS[executor].run(x, choice, experts(weights, "gelu"), places)[0]
    run = jax.jit(apply, static_argnums=1)
    few, all_of_them = np.asarray(run(x.astype(np.float32), 2)), np.asarray(run(x.astype(np.float32), S))
    kept = np.stack([moe.place(group, 2) for group in expert])[..., 0]
    assert not few[~kept].any()
    assert all_of_them[(expert[..., 0] >= 0)].any(axis=-1).all()
    tiny.close(few[kept], all_of_them[kept])
