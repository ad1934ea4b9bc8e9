"""Against a loop written from section 2.1 and appendix A of Shazeer et al. 2017 (arXiv 1701.06538)."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import norm

from sparse_lm import config as configs
from sparse_lm.routing.noisy_topk import NoisyTopK
from tests import tiny

G, S, D, E, K = 3, 8, 16, 5, 2
OPTIONS = {"importance_loss": 0.3, "load_loss": 0.2}


def router(experts=E, top_k=K, over="group", **options):
    choice = configs.choice("noisy_topk", **options)
    fields = {"model__experts": experts, "model__top_k": top_k, "model__balance_over": over}
    made = NoisyTopK(tiny.config(model__router=choice, **fields).model, nnx.Rngs(params=0), **options)
    random = np.random.default_rng(1)
    made.kernel[...] = jnp.asarray(random.normal(size=(D, experts)) * 0.3, jnp.float32)
    made.noise[...] = jnp.asarray(random.normal(size=(D, experts)) * 0.3, jnp.float32)
    return made


@functools.partial(jax.jit, static_argnums=0)
def run(graph, parameters, x, valid, key, given):
    return nnx.merge(graph, parameters).route(x, jnp.zeros(valid.shape, jnp.int32), valid, {}, key, given)


def route(made, x, valid, key=None, given=None):
    return run(*nnx.split(made), x, valid, key, given)


def loop(x, valid, gate, noise, drawn, k=K, over="group"):
    """Experts [G, S, K] in the order of their scores, weights, and both losses without their coefficients; the smallest
    gap between scores that decides anything. drawn: standard normal numbers [G, S, E]."""
    groups, size, _ = x.shape
    experts = gate.shape[1]
    expert, weight = np.full((groups, size, k), -1), np.zeros((groups, size, k))
    importance, load, gap = np.zeros((groups, experts)), np.zeros((groups, experts)), np.inf
    for g, s in zip(*np.nonzero(valid)):
        clean = x[g, s] @ gate
        spread = np.log1p(np.exp(x[g, s] @ noise)) + 0.01
        noisy = clean + drawn[g, s] * spread  # equation 4
        expert[g, s] = np.argsort(-noisy)[:k]
        kept = np.exp(noisy[expert[g, s]])
        weight[g, s] = kept / kept.sum()  # equations 3 and 5
        gap = min(gap, np.diff(np.sort(noisy)).min())
        for e, w in zip(expert[g, s], weight[g, s]):
            importance[g, e] += w  # equation 6
        for e in range(experts):
            kth_excluding = np.sort(np.delete(noisy, e))[-k]
            load[g, e] += norm.cdf((clean[e] - kth_excluding) / spread[e])  # equations 9 and 10
    tokens = valid.sum(axis=1)
    if over == "batch":
        importance, load, tokens = (a.sum(axis=0, keepdims=True) for a in (importance, load, tokens))
    squared_cv = lambda a: (np.std(a) / np.mean(a)) ** 2
    losses = [sum(n * squared_cv(row) for n, row in zip(tokens, a) if n) for a in (importance, load)]
    return expert, weight, losses, gap


def wide(made):
    return np.asarray(made.kernel[...], np.float64), np.asarray(made.noise[...], np.float64)


def inputs(made, drawn):
    """Tokens that no near-tie decides about; a group of padding alone."""
    for seed in itertools.count():
        random = np.random.default_rng(seed)
        x, valid = random.normal(size=(G, S, D)).astype(np.float32), random.random((G, S)) < 0.7
        valid[2] = False
        if loop(x.astype(np.float64), valid, *wide(made), drawn)[-1] > 1e-3:
            return x, valid


@pytest.fixture(scope="module", params=[False, True], ids=["evaluation", "training"])
def routed(request):
    made = router(**OPTIONS)
    key = jax.random.key(7) if request.param else None
    drawn = np.asarray(jax.random.normal(key, (G, S, E)), np.float64) if request.param else np.zeros((G, S, E))
    x, valid = inputs(made, drawn)
    return made, x, valid, key, drawn, route(made, x, valid, key)


def test_choice_weights_and_losses_are_those_of_the_loop(routed):
    made, x, valid, _, drawn, (choice, losses, statistics) = routed
    expert, weight, (importance, load), _ = loop(x.astype(np.float64), valid, *wide(made), drawn)
    np.testing.assert_array_equal(choice.expert, expert)
    tiny.close(choice.weight, weight)
    assert losses["importance_loss"] == pytest.approx(0.3 * importance, rel=1e-4)
    assert losses["load_loss"] == pytest.approx(0.2 * load, rel=1e-4)
    np.testing.assert_array_equal(statistics["load"], np.bincount(expert[expert >= 0], minlength=E))


def test_over_the_batch_the_loads_of_its_groups_are_summed(routed):
    _, x, valid, key, drawn, _ = routed
    made = router(over="batch", **OPTIONS)
    _, _, (importance, load), _ = loop(x.astype(np.float64), valid, *wide(made), drawn, over="batch")
    losses = route(made, x, valid, key).losses
    assert losses["importance_loss"] == pytest.approx(0.3 * importance, rel=1e-4)
    assert losses["load_loss"] == pytest.approx(0.2 * load, rel=1e-4)


@pytest.mark.parametrize("name", ["kernel", "noise"])
def test_gradients_of_weights_and_losses_are_finite_differences_of_the_loop(routed, name):
    made, x, valid, key, drawn, _ = routed
    random = np.random.default_rng(3)
    back, direction = random.normal(size=(G, S, K)), random.normal(size=(D, E))
    graph, parameters = nnx.split(made)

    def total_of(parameters):
        choice, losses, _ = run(graph, parameters, x, valid, key, None)
        return (choice.weight * back).sum() + sum(losses.values())

    found = jax.grad(total_of)(parameters)[name][...]

    def total(step):
        gate, noise = wide(made)
        moved = (gate + step * direction, noise) if name == "kernel" else (gate, noise + step * direction)
        _, weight, (importance, load), _ = loop(x.astype(np.float64), valid, *moved, drawn)
        return (weight * back).sum() + 0.3 * importance + 0.2 * load

    expected = (total(1e-6) - total(-1e-6)) / 2e-6
    assert (np.asarray(found) * direction).sum() == pytest.approx(expected, rel=1e-3)


def test_the_content_of_padding_changes_nothing(routed):
    made, x, valid, key, _, expected = routed
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid, key), expected)


def test_given_experts_are_taken_with_weights_from_the_tokens(routed):
    made, x, valid, key, drawn, own = routed
    tiny.equal(route(made, x, valid, key, own.choice.expert), own)
    choice, _, _ = route(made, x, valid, key, jnp.broadcast_to(jnp.array([4, 1]), (G, S, K)))
    np.testing.assert_array_equal(choice.expert, np.where(valid[..., None], [4, 1], -1))
    gate, noise = wide(made)
    noisy = (x @ gate + drawn * (np.log1p(np.exp(x @ noise)) + 0.01))[..., [4, 1]]
    tiny.close(choice.weight, np.where(valid[..., None], np.exp(noisy) / np.exp(noisy).sum(-1, keepdims=True), 0))


def test_the_noise_has_the_trained_deviation():
    """Beside the third, the first of two is chosen with probability Φ(difference of their scores / deviation of that of
    their noises)."""
    made = router(experts=3, top_k=2)
    made.kernel[...] = jnp.zeros((D, 3)).at[0].set(jnp.array([0.8, 0, 50]))
    made.noise[...] = jnp.zeros((D, 3)).at[0, 1].set(1.5)
    tokens = 20_000
    x = np.zeros((1, tokens, D), np.float32)
    x[..., 0] = 1
    choice, _, _ = route(made, x, np.ones((1, tokens), bool), jax.random.key(0))
    deviation = np.hypot(np.log(2) + 0.01, np.log1p(np.exp(1.5)) + 0.01)
    first = norm.cdf(0.8 / deviation)
    assert (np.asarray(choice.expert) == 0).any(axis=-1).mean() == pytest.approx(first, abs=4 * np.sqrt(0.25 / tokens))


def test_the_first_loads_are_about_equal():
    made = NoisyTopK(tiny.config(model__experts=8, model__top_k=2).model, nnx.Rngs(params=0))
    x = np.random.default_rng(0).normal(size=(1, 4096, D)).astype(np.float32)
    x += x.mean(axis=1, keepdims=True) + 1  # tokens that are alike, as they are in a model
    _, losses, statistics = route(made, x, np.ones((1, 4096), bool), jax.random.key(0))
    load = np.asarray(statistics["load"])
    assert load.std() / load.mean() < 0.1
    assert losses["load_loss"] / 4096 < 0.1 * 0.01


@pytest.mark.parametrize("experts, top_k", [(1, 1), (3, 3)])
def test_where_every_expert_is_chosen_the_load_is_even(experts, top_k):
    made = router(experts=experts, top_k=top_k, **OPTIONS)
    x = np.random.default_rng(0).normal(size=(G, S, D)).astype(np.float32)
    choice, losses, _ = route(made, x, np.ones((G, S), bool), jax.random.key(0))
    assert losses["load_loss"] == 0
    tiny.close(choice.weight.sum(axis=-1), np.ones((G, S)))
    assert experts > 1 or losses["importance_loss"] == 0


@pytest.mark.parametrize("score", [0.0, 1e30, -1e30, np.inf, -np.inf, np.nan])
def test_extreme_scores_give_valid_choices(score):
    made = router()
    made.kernel[...] = jnp.full((D, E), score)
    made.noise[...] = jnp.full((D, E), -1e30)
    choice, _, _ = route(made, np.ones((G, S, D), np.float32), np.ones((G, S), bool), jax.random.key(0))
    expert = np.asarray(choice.expert)
    assert ((expert >= 0) & (expert < E)).all() and (expert[..., 0] != expert[..., 1]).all()
