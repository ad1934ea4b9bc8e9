"""Against a loop written from section 3.2 of Zhou et al. 2022 (arXiv 2202.09368)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.expert_choice import ExpertChoiceRouter
from tests import tiny

G, S, D, E, K, C = 3, 16, 16, 4, 2, 3  # C: 0.375 · 2 · 16 / 4


def router(experts=E, top_k=K, factor=0.375):
    choice = configs.choice("expert_choice")
    fields = {"model__experts": experts, "model__top_k": top_k, "model__capacity_factor": factor}
    return ExpertChoiceRouter(tiny.config(model__router=choice, **fields).model, nnx.Rngs(params=0))


@functools.partial(jax.jit, static_argnums=(0, 5))
def run(graph, parameters, x, valid, given, alone=False):
    made, ids = nnx.merge(graph, parameters), jnp.zeros(valid.shape, jnp.int32)
    return made.route_alone(x, ids, valid, {}) if alone else made.route(x, ids, valid, {}, None, given)


def route(made, x, valid, given=None, alone=False):
    return run(*nnx.split(made), x, valid, given, alone)


def softmax(x, kernel):
    p = np.exp(x @ kernel)
    return p / p.sum(axis=-1, keepdims=True)


def loop(x, valid, kernel, places=C):
    """Tokens and weights [G, E, C], the best token first; the smallest gap between scores of an expert."""
    experts = kernel.shape[1]
    token, weight, gap = np.full((len(x), experts, places), -1), np.zeros((len(x), experts, places)), np.inf
    for g, e in np.ndindex(len(x), experts):
        score = {s: softmax(x[g, s], kernel)[e] for s in range(x.shape[1]) if valid[g, s]}
        best = sorted(score, key=lambda s: -score[s])
        for place, s in enumerate(best[:places]):
            token[g, e, place], weight[g, e, place] = s, score[s]
        gap = min([gap, *-np.diff([score[s] for s in best])])
    return token, weight, gap


@pytest.fixture(scope="module")
def routed():
    made = router()
    kernel = np.asarray(made.kernel[...], np.float64)
    for seed in itertools.count():
        random = np.random.default_rng(seed)
        x, valid = random.normal(size=(G, S, D)).astype(np.float32), random.random((G, S)) < 0.9
        valid[1, 2:] = False  # fewer tokens than places
        valid[2] = False
        if loop(x.astype(np.float64), valid, kernel)[-1] > 1e-6:
            return made, x, valid, kernel, route(made, x, valid)


def test_each_expert_takes_its_best_tokens_with_their_scores(routed):
    _, x, valid, kernel, (choice, losses, statistics) = routed
    token, weight, _ = loop(x.astype(np.float64), valid, kernel)
    np.testing.assert_array_equal(choice.token, token)
    tiny.close(choice.weight, weight)
    assert losses == {}
    assert statistics["load"].tolist() == [C + valid[1].sum()] * E  # every expert the same
    taken = sum(len(set(token[g].ravel()) - {-1}) for g in range(G))
    assert statistics["unrouted"] == valid.sum() - taken > 0


def test_gradients_of_weights_are_finite_differences_of_the_loop(routed):
    made, x, valid, kernel, _ = routed
    random = np.random.default_rng(3)
    back, direction = random.normal(size=(G, E, C)), random.normal(size=(D, E))
    graph, parameters = nnx.split(made)
    total = lambda parameters: (run(graph, parameters, x, valid, None).choice.weight * back).sum()
    found = (np.asarray(jax.grad(total)(parameters)["kernel"][...]) * direction).sum()
    moved = lambda step: (loop(x.astype(np.float64), valid, kernel + step * direction)[1] * back).sum()
    assert found == pytest.approx((moved(1e-7) - moved(-1e-7)) / 2e-7, rel=1e-3)


def test_the_content_of_padding_changes_nothing(routed):
    made, x, valid, _, expected = routed
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid), expected)


def test_given_tokens_are_taken_with_weights_from_them(routed):
    made, x, valid, kernel, own = routed
    tiny.equal(route(made, x, valid, own.choice.token), own)
    given = np.random.default_rng(0).permuted(np.tile(np.arange(-1, S), (G, E, 1)), axis=-1)[..., :C].astype(np.int32)
    choice, _, _ = route(made, x, valid, given)
    p = softmax(x, kernel)
    for g, e, c in np.ndindex(G, E, C):
        s = given[g, e, c]
        there = s >= 0 and valid[g, s]  # padding is never taken
        assert choice.token[g, e, c] == (s if there else -1)
        assert choice.weight[g, e, c] == pytest.approx(p[g, s, e] if there else 0, rel=1e-4)


def test_alone_each_token_goes_to_the_experts_of_its_largest_scores(routed):
    made, x, valid, kernel, _ = routed
    choice, _, statistics = route(made, x, valid, alone=True)
    p = softmax(x, kernel)
    best = np.argsort(-p, axis=-1)[..., :K]
    np.testing.assert_array_equal(choice.expert, np.where(valid[..., None], best, -1))
    tiny.close(choice.weight, np.where(valid[..., None], np.take_along_axis(p, best, axis=-1), 0))
    assert statistics["load"].sum() == K * valid.sum()
    by_itself = route(made, x.reshape(G * S, 1, D), valid.reshape(G * S, 1), alone=True).choice
    np.testing.assert_array_equal(by_itself.expert.reshape(G, S, K), choice.expert)


@pytest.mark.parametrize("experts, top_k, factor, places", [(1, 1, 1.0, S), (3, 3, 2.0, S), (64, 1, 1.0, 1)])
def test_places_are_an_even_share_times_the_factor_and_at_most_all_tokens(experts, top_k, factor, places):
    x = np.random.default_rng(0).normal(size=(G, S, D)).astype(np.float32)
    choice = route(router(experts, top_k, factor), x, np.ones((G, S), bool)).choice
    assert choice.token.shape == (G, experts, places)
    if places == S:
        np.testing.assert_array_equal(np.sort(choice.token), np.broadcast_to(range(S), (G, experts, S)))
    assert experts > 1 or (np.asarray(choice.weight) == 1).all()


@pytest.mark.parametrize("score", [0.0, 1e30, -1e30, np.inf, -np.inf, np.nan])
def test_extreme_scores_give_valid_choices(score):
    made = router()
    made.kernel[...] = jnp.zeros((D, E)).at[:, 0].set(score)
    valid = np.ones((G, S), bool)
    valid[0, 2:] = False
    token = np.asarray(route(made, np.ones((G, S, D), np.float32), valid).choice.token)
    assert token.max() < S and not set(token[0].ravel()) & set(range(2, S))
    for row in token.reshape(G * E, C):
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_a_factor_without_a_limit_is_refused():
    with pytest.raises(UserError, match="model.capacity_factor is inf; the router 'expert_choice' needs a finite one"):
        router(factor=float("inf"))
