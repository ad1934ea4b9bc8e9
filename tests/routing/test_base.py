import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.base import STEPS, Base, assign
from tests import tiny
from tests.routing import leaning
from tests.routing.leaning import route

GROUPS, SIZE, D, E = 4, 16, 16, 4
assigned = jax.jit(jax.vmap(assign))


def router(top_k=1):
    model = tiny.config(model__experts=E, model__top_k=top_k, model__router=configs.choice("base")).model
    return Base(model, nnx.Rngs(params=0))


tokens = functools.partial(leaning.tokens, GROUPS, SIZE, D)


def best(scores, valid):
    """The optimum by SciPy, on places: fair ones of each expert, and one more, of which idle tokens take some."""
    real, experts = scores[valid].astype(np.float64), scores.shape[1]
    fair, more = divmod(len(real), experts)
    names = np.concatenate([np.repeat(np.arange(experts), fair), np.arange(experts)])
    idle = np.full((experts - more, len(names)), -1e3 * (1 + np.abs(real).max(initial=0)))
    idle[:, fair * experts :] = 0
    row, place = linear_sum_assignment(np.concatenate([real[:, names], idle]), maximize=True)
    expert = np.full(len(valid), -1)
    expert[valid] = names[place[row < len(real)]]
    return expert


def total(scores, expert):
    return sum(float(scores[t, e]) for t, e in enumerate(expert) if e >= 0)


def is_even(expert, valid, experts):
    load, tokens = np.bincount(expert[valid], minlength=experts), valid.sum()
    return (expert[~valid] == -1).all() and load.min() >= tokens // experts and load.max() <= -(-tokens // experts)


@pytest.mark.parametrize("size, experts", [(16, 4), (24, 5), (9, 12), (32, 16)])
def test_the_assignment_is_that_of_scipy(size, experts):
    random = np.random.default_rng(size)
    scores = random.normal(size=(12, size, experts)) + 2 * random.normal(size=(12, 1, experts))
    scores = scores.astype(np.float32)
    valid = random.random((12, size)) < np.linspace(0, 1, 12)[:, None]
    for s, v, expert in zip(scores, valid, np.asarray(assigned(scores, valid))):
        np.testing.assert_array_equal(expert, best(s, v))


def test_experts_that_get_one_more_are_the_best_ones():
    """All ways to send 7 tokens to 3 experts, 2 or 3 to each."""
    ways = [w for w in itertools.product(range(3), repeat=7) if sorted(map(w.count, range(3))) == [2, 2, 3]]
    scores = np.random.default_rng(1).normal(size=(10, 7, 3)).astype(np.float32) + np.float32([3, 0, 0])
    for s, expert in zip(scores, np.asarray(assigned(scores, np.ones((10, 7), bool)))):
        assert tuple(expert) == max(ways, key=lambda way: total(s, way))


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e38])
def test_with_many_ties_and_wide_scores_the_sum_is_the_largest_within_the_bound(spread):
    random = np.random.default_rng(2)
    scores = (random.integers(-3, 4, (10, SIZE, E)) * spread).astype(np.float32)
    scores[5:] *= random.random((5, SIZE, E)).astype(np.float32)
    valid = random.random((10, SIZE)) < 0.8
    for s, v, expert in zip(scores, valid, np.asarray(assigned(scores, valid))):
        widest = (s.max(axis=1, keepdims=True).astype(np.float64) - s)[v].max()
        assert total(s, best(s, v)) - total(s, expert) <= 2 * v.sum() * widest / STEPS
        assert is_even(expert, v, E)


odd = st.sampled_from([0.0, 1.0, 1.0, -1.0, 1e-42, 3e38, -3e38, np.inf, -np.inf, np.nan])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(odd, min_size=SIZE * E, max_size=SIZE * E),
    st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
)
def test_any_scores_give_an_even_assignment(scores, valid):
    scores, valid = np.array(scores, np.float32).reshape(1, SIZE, E), np.array([valid])
    assert is_even(np.asarray(assigned(scores, valid))[0], valid[0], E)


def test_an_infinite_score_spares_the_others():
    """One token that wants an expert without limit gets it, and the others are assigned as well as can be."""
    scores = np.random.default_rng(3).normal(size=(1, SIZE, E)).astype(np.float32)
    scores[0, 2, 1], scores[0, 5, 3] = np.inf, -np.inf
    expert = np.asarray(assigned(scores, np.ones((1, SIZE), bool)))[0]
    finite = np.where(np.isinf(scores[0]), np.sign(scores[0]) * 1e3, scores[0])
    np.testing.assert_array_equal(expert, best(finite, np.ones(SIZE, bool)))


def test_training_assigns_and_weighs_by_the_sigmoid_of_the_score():
    made, (x, valid) = router(), tokens()
    choice, losses, statistics = route(made, x, valid, jax.random.key(0))
    scores = x.astype(np.float64) @ np.asarray(made.kernel[...], np.float64)
    for g in range(GROUPS):
        expert = np.asarray(choice.expert)[g, :, 0]
        np.testing.assert_array_equal(expert, best(scores[g], valid[g]))
        for s in range(SIZE):
            expected = 1 / (1 + np.exp(-scores[g, s, expert[s]])) if valid[g, s] else 0
            assert choice.weight[g, s, 0] == pytest.approx(expected, rel=1e-5)
    assert losses == {} and statistics["tokens"] == valid.sum()
    np.testing.assert_array_equal(np.bincount(np.asarray(choice.expert)[0, :, 0]), [SIZE // E] * E)


def test_evaluation_is_greedy_and_looks_at_no_other_token():
    made, (x, valid) = router(), tokens()
    choice = route(made, x, valid).choice
    scores = x.astype(np.float64) @ np.asarray(made.kernel[...], np.float64)
    np.testing.assert_array_equal(choice.expert[..., 0], np.where(valid, scores.argmax(axis=-1), -1))
    first = jnp.asarray(x[:, :1]), jnp.zeros((GROUPS, 1), int), jnp.asarray(valid[:, :1])
    alone = made.route_alone(*first, {}).choice
    np.testing.assert_array_equal(alone.expert, choice.expert[:, :1])


def test_training_leaks_and_says_so():
    made, (x, valid) = router(), tokens()
    other = x.copy()
    other[:, SIZE // 2 :] = x[:, SIZE // 2 - 1 : SIZE // 2]  # the second half becomes like one token of the first
    early = lambda x, key: np.asarray(route(made, x, valid, key).choice.expert)[:, : SIZE // 2]
    assert (early(x, jax.random.key(0)) != early(other, jax.random.key(0))).any()
    np.testing.assert_array_equal(early(x, None), early(other, None))
    assert "assigned to experts together" in Base.looks_ahead


def test_groups_and_padding_do_not_matter():
    made, (x, valid) = router(), tokens()
    whole = route(made, x, valid, jax.random.key(0))
    other = np.where(valid[..., None], x, 1e4).astype(np.float32)
    tiny.equal(route(made, other, valid, jax.random.key(1)), whole)
    for g in range(GROUPS):
        part = route(made, x[g : g + 1], valid[g : g + 1], jax.random.key(0)).choice
        np.testing.assert_array_equal(part.expert[0], whole.choice.expert[g])


def test_a_recorded_choice_replays():
    made, (x, valid) = router(), tokens()
    own = route(made, x, valid, jax.random.key(0))
    tiny.equal(route(made, x, valid, jax.random.key(0), own.choice.expert), own)


def test_gradients_are_those_of_the_sigmoid_alone():
    """Also where the layer is scanned and rematerialised."""
    made, (x, valid) = router(), map(jnp.asarray, tokens())
    graph, state = nnx.split(made)
    pull = np.random.default_rng(4).normal(size=(GROUPS, SIZE, 1)).astype(np.float32)
    ids = jnp.zeros(valid.shape, int)

    @jax.checkpoint
    def layer(total, state):
        weight = nnx.merge(graph, state).route(x, ids, valid, {}, jax.random.key(0)).choice.weight
        return total + (weight * pull).sum(), None

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    gradient = jax.jit(jax.grad(lambda state: jax.lax.scan(layer, 0.0, state)[0]))(stacked)
    choice = route(made, x, valid, jax.random.key(0)).choice
    expected = np.zeros((D, E))
    for g, s in np.argwhere(valid):
        w = float(choice.weight[g, s, 0])
        expected[:, choice.expert[g, s, 0]] += pull[g, s, 0] * w * (1 - w) * x[g, s]
    for layer in range(2):
        tiny.close(gradient["kernel"][...][layer], expected)


def test_two_choices_are_refused():
    with pytest.raises(UserError, match="model.top_k is 2; the router 'base' sends each token to 1 expert"):
        router(top_k=2)
