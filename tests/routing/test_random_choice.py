import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.routing.random_choice import Random, code
from tests import tiny

G, S, D, E, K = 4, 256, 64, 8, 3


def router(experts=E, top_k=K):
    choice = configs.choice("random")
    fields = {"model__experts": experts, "model__top_k": top_k, "model__width": D}
    return Random(tiny.config(model__router=choice, **fields).model, nnx.Rngs(params=0))


@functools.partial(jax.jit, static_argnums=0)
def run(graph, x, ids, valid, key, given):
    return nnx.merge(graph, nnx.State({})).route(x, ids, valid, {}, key, given)


def route(made, x, ids=None, valid=None, key=None, given=None):
    ids = np.zeros(x.shape[:2], np.int32) if ids is None else ids
    return run(nnx.split(made)[0], x, ids, np.ones(x.shape[:2], bool) if valid is None else valid, key, given)


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(G, S, D)).astype(np.float32)


KEYS = pytest.mark.parametrize("key", [None, 7], ids=["evaluation", "training"])
as_key = lambda seed: None if seed is None else jax.random.key(seed)


@KEYS
def test_each_token_gets_distinct_experts_of_equal_weight(key):
    choice, losses, _ = route(router(), tokens(), key=as_key(key))
    assert (np.diff(np.sort(choice.expert, axis=-1), axis=-1) > 0).all()
    np.testing.assert_array_equal(choice.weight, np.full((G, S, K), np.float32(1 / K)))
    assert losses == {} and nnx.state(router()) == {}


@KEYS
def test_experts_are_equally_likely_and_independent(key):
    """Loads of the first and of each pair of choices, within four deviations of a multinomial draw."""
    expert = np.asarray(route(router(), tokens(), key=as_key(key)).choice.expert).reshape(-1, K)
    n = len(expert)
    pairs = np.bincount(expert[:, 0] * E + expert[:, 1], minlength=E * E).reshape(E, E)
    assert not np.diag(pairs).any()
    for counts, p in ((np.bincount(expert[:, 0]), 1 / E), (pairs[~np.eye(E, dtype=bool)], 1 / (E * (E - 1)))):
        assert np.abs(counts - n * p).max() < 4 * np.sqrt(n * p * (1 - p))
    after = (expert[1:, 0] == expert[:-1, 0]).mean()  # the next token's choice knows nothing of this one's
    assert after == pytest.approx(1 / E, abs=4 * np.sqrt(1 / E / n))


def test_a_key_draws_anew_whatever_the_features():
    made = router()
    first, second = (route(made, 0 * tokens(), key=jax.random.key(seed)).choice.expert for seed in (1, 2))
    assert (first != second).any(axis=-1).mean() > 0.9
    np.testing.assert_array_equal(first, route(made, tokens(), key=jax.random.key(1)).choice.expert)


def test_without_a_key_a_token_chooses_alike_wherever_it_stands():
    made, x = router(), tokens()
    choice = route(made, x).choice
    moved = route(made, x.reshape(G * S, 1, D)).choice  # alone in its group, as in generation
    np.testing.assert_array_equal(moved.expert.reshape(G, S, K), choice.expert)


def test_without_a_key_the_context_decides_and_not_the_id():
    made, x = router(), tokens()
    choice = route(made, x).choice.expert
    np.testing.assert_array_equal(choice, route(made, x, ids=np.full((G, S), 5, np.int32)).choice.expert)
    nudged = x + 0.3 * tokens(seed=1)  # the same token in a context that is a little different
    assert (route(made, nudged).choice.expert != choice).any(axis=-1).mean() > 0.8


def test_without_a_key_rounding_changes_hardly_any_choice():
    x = tokens()
    rounded = x * (1 + 1e-6 * tokens(seed=1)) + 1e-6 * tokens(seed=2)
    assert (np.asarray(code(jnp.asarray(x))) != np.asarray(code(jnp.asarray(rounded)))).mean() < 1e-3


def test_the_code_is_the_signs_of_32_features_or_fewer():
    x = -np.ones((1, 3, 40), np.float32)
    x[0, 1, [0, 5, 31, 39]] = 1
    x[0, 2] = 1
    assert np.asarray(code(jnp.asarray(x)))[0].tolist() == [0, 1 + 2**5 + 2**31, 2**32 - 1]
    assert np.asarray(code(jnp.asarray(x[..., :6])))[0].tolist() == [0, 33, 63]


@KEYS
def test_padding_gets_nobody_and_changes_nothing(key):
    made, x = router(), tokens()
    valid = np.random.default_rng(0).random((G, S)) < 0.7
    valid[2] = False
    whole, padded = route(made, x, key=as_key(key)), route(made, x, valid=valid, key=as_key(key))
    np.testing.assert_array_equal(padded.choice.expert, np.where(valid[..., None], whole.choice.expert, -1))
    assert not np.asarray(padded.choice.weight)[~valid].any()
    assert padded.statistics["load"].sum() == K * valid.sum()
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid=valid, key=as_key(key)), padded)


@KEYS
def test_given_experts_are_taken(key):
    made, x = router(), tokens()
    own = route(made, x, key=as_key(key))
    tiny.equal(route(made, x, key=as_key(key), given=own.choice.expert), own)
    given = jnp.broadcast_to(jnp.array([5, 0, 2]), (G, S, K))
    np.testing.assert_array_equal(route(made, x, key=as_key(key), given=given).choice.expert, given)


@KEYS
@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 3)])
def test_every_expert_can_be_chosen(key, experts, top_k):
    choice = route(router(experts, top_k), tokens(), key=as_key(key)).choice
    np.testing.assert_array_equal(np.sort(choice.expert, axis=-1), np.broadcast_to(range(top_k), (G, S, top_k)))
    np.testing.assert_array_equal(choice.weight, np.full((G, S, top_k), np.float32(1 / top_k)))
