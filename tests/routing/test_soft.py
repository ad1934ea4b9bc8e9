import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.choice import SoftSlots
from sparse_lm.routing.health import health
from sparse_lm.routing.soft import Soft
from tests import tiny

GROUPS, SIZE, D, E, C = 3, 8, 16, 4, 3


def router(group_size=SIZE, **options):
    fields = {"model__experts": E, "model__capacity_factor": 1.5, "model__group_size": group_size}
    made = tiny.config(model__router=configs.choice("soft", **options), **fields)
    return Soft(made.model, nnx.Rngs(params=0), **options)


def tokens(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((GROUPS, SIZE)) < 0.7
    valid[0], valid[-1] = True, False
    return random.normal(size=(GROUPS, SIZE, D)).astype(np.float32), valid


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name, graph, state, x, valid):
    return getattr(nnx.merge(graph, state), name)(x, jnp.zeros(valid.shape, int), valid, {})


def call(made, name, x, valid):
    return run(name, *nnx.split(made), x, valid)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def logits(made, x):
    """Of all tokens for all slots, one by one."""
    phi, found = np.asarray(made.phi[...], np.float64), np.zeros((*x.shape[:2], E, C))
    for g, s, e, c in np.ndindex(found.shape):
        token, slot = x[g, s].astype(np.float64), phi[:, e, c]
        found[g, s, e, c] = token @ slot
        if made.scale is not None:
            found[g, s, e, c] *= float(made.scale[0]) / np.linalg.norm(token) / np.linalg.norm(slot)
    return found


@pytest.mark.parametrize("normalize", [True, False])
def test_slots_mix_tokens_and_tokens_mix_slots(normalize):
    made, (x, valid) = router(normalize=normalize), tokens()
    if normalize:
        made.scale[...] = jnp.array([7.0])
    choice, losses, statistics = call(made, "route", x, valid)
    dispatch, combine = np.zeros((2, GROUPS, SIZE, E, C))
    found = logits(made, x)
    for g in range(GROUPS):
        for e, c in np.ndindex(E, C):
            if valid[g].any():
                dispatch[g, valid[g], e, c] = softmax(found[g, valid[g], e, c])
        for s in np.flatnonzero(valid[g]):
            combine[g, s] = softmax(found[g, s])
    tiny.close(choice, SoftSlots(dispatch, combine))
    assert losses == {} and statistics["tokens"] == valid.sum()
    tiny.close(statistics["load"], np.full(E, 2.0 * C))  # of the two groups that have tokens


def test_health_is_that_of_the_shares_of_experts():
    made, (x, valid) = router(), tokens()
    made.scale[...] = jnp.array([5.0])
    choice, _, statistics = call(made, "route", x, valid)
    share = np.asarray(choice.combine).sum(axis=-1)[valid].astype(np.float64)
    found = health(statistics | {"dropped": jnp.zeros(())})
    assert found["top_probability"] == pytest.approx(share.max(axis=-1).mean(), rel=1e-5)
    assert found["entropy"] == pytest.approx(-(share * np.log(share)).sum(axis=-1).mean() / math.log(E), rel=1e-5)
    rms = np.sqrt((np.log(np.exp(logits(made, x)).mean(axis=-1))[valid] ** 2).mean())
    assert found["logit_rms"] == pytest.approx(rms, rel=1e-5)
    assert found["load_cv"] == pytest.approx(0, abs=1e-6)


def test_groups_and_padding_do_not_matter():
    made, (x, valid) = router(), tokens()
    whole = call(made, "route", x, valid)
    for odd in (1e4, np.nan):
        tiny.equal(call(made, "route", np.where(valid[..., None], x, odd).astype(np.float32), valid), whole)
    part = call(made, "route", x[1:2], valid[1:2]).choice
    tiny.close(part, jax.tree.map(lambda leaf: np.asarray(leaf[1:2]), whole.choice))


def output(choice, x, weights):
    """Experts that are a matrix and tanh each."""
    if isinstance(choice, SoftSlots):
        slots = np.tanh(np.einsum("gsec,gsd,edf->gecf", choice.dispatch, x, weights))
        return np.einsum("gsec,gecf->gsf", choice.combine, slots)
    every = np.tanh(np.einsum("gsd,edf->gsef", x, weights))
    return np.einsum("gske,gsk,gsef->gsf", np.eye(E)[choice.expert], choice.weight, every)


@pytest.mark.parametrize("normalize", [True, False])
def test_a_token_alone_gives_what_a_group_of_one_gives(normalize):
    made, (x, _) = router(normalize=normalize), tokens()
    weights = np.random.default_rng(1).normal(size=(E, D, D))
    alone = call(made, "route_alone", x, np.ones((GROUPS, SIZE), bool)).choice
    single = x.reshape(-1, 1, D)
    of_one = call(made, "route", single, np.ones(single.shape[:2], bool)).choice
    tiny.close(output(alone, x, weights).reshape(-1, 1, D), output(of_one, single, weights))


def test_padding_alone_gets_nobody():
    made, (x, valid) = router(), tokens()
    choice, _, statistics = call(made, "route_alone", x, valid)
    assert (np.asarray(choice.expert)[~valid] == -1).all() and not np.asarray(choice.weight)[~valid].any()
    np.testing.assert_array_equal(statistics["load"], [valid.sum()] * E)


def test_slots_are_parameters_and_stay_when_groups_get_smaller():
    made, (x, valid) = router(), tokens()
    assert made.phi.get_metadata("axes") == ("width", "router_experts", "slots")
    assert made.phi[...].shape == (D, E, C) and made.scale[...] == 1 and router(normalize=False).scale is None
    assert router(group_size=16).phi[...].shape == (D, E, 6)
    graph, _ = nnx.split(router(group_size=1))  # as generation builds the model
    small = nnx.merge(graph, nnx.split(made)[1])
    tiny.equal(call(small, "route_alone", x[:, :1], valid[:, :1]), call(made, "route_alone", x[:, :1], valid[:, :1]))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_finite_differences(normalize):
    made, (x, valid) = router(normalize=normalize), map(jnp.asarray, tokens())
    graph, state = nnx.split(made)
    pull = np.random.default_rng(2).normal(size=(2, GROUPS, SIZE, E, C))
    ids = jnp.zeros(valid.shape, int)

    def pulled(state, x):
        choice = nnx.merge(graph, state).route(x, ids, valid, {}).choice
        return (choice.dispatch * pull[0]).sum() + (choice.combine * pull[1]).sum()

    gradients = jax.jit(jax.grad(pulled, (0, 1)))(state, jnp.where(valid[..., None], x, jnp.nan))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[1])[~np.asarray(valid)].any()
    random, run = np.random.default_rng(3), jax.jit(pulled)
    way = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), (state, x))
    moved = lambda by: run(*jax.tree.map(lambda leaf, way: leaf + np.float32(by) * way, (state, x), way))
    slope = (float(moved(1e-2)) - float(moved(-1e-2))) / 2e-2
    along = sum(float((g * w).sum()) for g, w in zip(jax.tree.leaves(gradients), jax.tree.leaves(way)))
    assert slope == pytest.approx(along, rel=0.01)


def test_zero_tokens_and_huge_ones_are_finite():
    made, (x, valid) = router(), tokens()
    x[0, 0], x[0, 1] = 0, 1e18
    choice, _, _ = call(made, "route", x, valid)
    assert all(np.isfinite(part).all() for part in choice)
    tiny.close(choice.combine[0, 0], np.full((E, C), 1 / (E * C)))


def test_endless_slots_are_refused():
    model = tiny.config(model__experts=E, model__capacity_factor=math.inf).model
    with pytest.raises(UserError, match="model.capacity_factor is inf; the router 'soft' makes slots by it"):
        Soft(model, nnx.Rngs(params=0))
