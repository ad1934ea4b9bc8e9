import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS
from sparse_lm.routing.sinkhorn import Sinkhorn, balanced
from tests import tiny
from tests.routing import leaning
from tests.routing.leaning import route

GROUPS, SIZE, D, E = 4, 16, 16, 4
KEY = jax.random.key(0)


def router(top_k=1, **options):
    choice = configs.choice("sinkhorn", **options)
    model = tiny.config(model__experts=E, model__top_k=top_k, model__router=choice).model
    return create("model.router", ROUTERS, choice, model, nnx.Rngs(0))


tokens = functools.partial(leaning.tokens, GROUPS, SIZE, D)


def scores(made, x):
    return x.astype(np.float64) @ np.asarray(made.kernel[...], np.float64)


def plan(scores, iterations):
    """Rows of one group's plan: those of valid tokens alone."""
    plan = np.exp(scores)
    for _ in range(iterations):
        for row in plan:
            row /= row.sum()
        for column in plan.T:
            column *= len(plan) / scores.shape[1] / column.sum()
    return plan


@pytest.mark.parametrize("top_k, iterations", [(1, 8), (2, 8), (2, 1)])
def test_training_takes_the_largest_of_the_plan(top_k, iterations):
    made, (x, valid) = router(top_k, iterations=iterations), tokens()
    choice, losses, statistics = route(made, x, valid, KEY)
    expected = np.full((GROUPS, SIZE, top_k), -1)
    weight = np.zeros(expected.shape)
    for g in range(GROUPS - 1):  # the last has no tokens
        of_group = scores(made, x)[g, valid[g]]
        rows = plan(of_group, iterations)
        gaps = np.diff(np.sort(np.log(rows), axis=1)[:, ::-1], axis=1)[:, :top_k]
        assert np.abs(gaps).min(initial=1) > 1e-4  # no near-ties
        expected[g, valid[g]] = np.argsort(-rows, axis=1)[:, :top_k]
        weight[g, valid[g]] = np.take_along_axis(1 / (1 + np.exp(-of_group)), expected[g, valid[g]], axis=1)
    np.testing.assert_array_equal(choice.expert, expected)
    tiny.close(choice.weight, weight)
    assert losses == {} and statistics["tokens"] == valid.sum()
    np.testing.assert_array_equal(statistics["load"], np.bincount(expected[expected >= 0], minlength=E))


@pytest.mark.parametrize("top_k", [1, 2])
def test_evaluation_takes_the_largest_scores(top_k):
    made, (x, valid) = router(top_k), tokens()
    expert = np.argsort(-scores(made, x), axis=-1)[..., :top_k]
    np.testing.assert_array_equal(route(made, x, valid).choice.expert, np.where(valid[..., None], expert, -1))


def test_with_iterations_every_expert_has_an_equal_share_of_the_plan():
    random = np.random.default_rng(1)
    logits = (random.normal(size=(3, 64, E)) + [4, 0, 0, -4]).astype(np.float32)
    valid = random.random((3, 64)) < 0.8
    rows = np.asarray(jax.nn.softmax(balanced(jnp.asarray(logits), jnp.asarray(valid), 50)))
    for g in range(3):
        np.testing.assert_allclose(rows[g, valid[g]].sum(axis=0), valid[g].sum() / E, rtol=1e-4)


def test_training_is_nearly_even_where_greedy_choices_collapse():
    random = np.random.default_rng(2)
    made = router()
    made.kernel[...] = jnp.eye(D)[:, :E]
    x = random.normal(size=(8, 64, D)).astype(np.float32)
    x[..., 0] += 4
    valid = np.ones((8, 64), bool)
    greedy, even = (np.asarray(route(made, x, valid, key).statistics["load"]) for key in (None, KEY))
    assert greedy.max() > 3.8 * greedy.mean() and even.max() < 1.2 * even.mean()


def test_training_leaks_and_says_so_and_evaluation_does_not():
    made, (x, valid) = router(), tokens()
    other = x.copy()
    other[:, SIZE // 2 :] = x[:, SIZE // 2 - 1 : SIZE // 2]  # the second half becomes like one token of the first
    early = lambda x, key: np.asarray(route(made, x, valid, key).choice.expert)[:, : SIZE // 2]
    assert (early(x, KEY) != early(other, KEY)).any()
    np.testing.assert_array_equal(early(x, None), early(other, None))
    assert "assigned to experts together" in Sinkhorn.looks_ahead


def test_groups_and_padding_do_not_matter():
    made, (x, valid) = router(), tokens()
    whole = route(made, x, valid, KEY)
    other = np.where(valid[..., None], x, 1e4).astype(np.float32)
    tiny.equal(route(made, other, valid, jax.random.key(1)), whole)
    for g in range(GROUPS):
        part = route(made, x[g : g + 1], valid[g : g + 1], KEY).choice
        np.testing.assert_array_equal(part.expert[0], whole.choice.expert[g])


def test_a_recorded_choice_replays():
    made, (x, valid) = router(2), tokens()
    own = route(made, x, valid, KEY)
    tiny.equal(route(made, x, valid, KEY, own.choice.expert), own)


@pytest.mark.parametrize("odd", [0.0, 1e30, 3e38, np.inf, -np.inf, np.nan])
def test_odd_scores_give_valid_choices_and_spare_other_groups(odd):
    logits = np.random.default_rng(3).normal(size=(4, SIZE, E)).astype(np.float32)
    logits[0], logits[1, 2, 1], logits[2, :, 3] = odd, odd, -odd
    logits, valid = jnp.asarray(logits), jnp.ones((4, SIZE), bool)
    rows = balanced(logits, valid, 8)
    expert = np.asarray(jax.lax.top_k(rows, 2)[1])
    assert ((0 <= expert) & (expert < E)).all() and (expert[..., 0] != expert[..., 1]).all()
    assert np.isfinite(rows).all()
    np.testing.assert_array_equal(expert[3:], jax.lax.top_k(balanced(logits[3:], valid[3:], 8), 2)[1])


def test_gradients_are_those_of_the_sigmoid_alone():
    made, (x, valid) = router(2), map(jnp.asarray, tokens())
    graph, state = nnx.split(made)
    pull = np.random.default_rng(4).normal(size=(GROUPS, SIZE, 2)).astype(np.float32)
    ids = jnp.zeros(valid.shape, int)

    def pulled(state):
        return (nnx.merge(graph, state).route(x, ids, valid, {}, KEY).choice.weight * pull).sum()

    choice = route(made, x, valid, KEY).choice
    expected = np.zeros((D, E))
    for g, s in np.argwhere(valid):
        for k in range(2):
            w = float(choice.weight[g, s, k])
            expected[:, choice.expert[g, s, k]] += pull[g, s, k] * w * (1 - w) * x[g, s]
    tiny.close(jax.jit(jax.grad(pulled))(state)["kernel"][...], expected)


def test_no_iterations_are_refused():
    with pytest.raises(UserError, match="model.router.options.iterations is 0; it must be at least 1"):
        router(iterations=0)
