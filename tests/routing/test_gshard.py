"""Against a loop written from algorithm 1 of Lepikhin et al. 2020 (arXiv 2006.16668), without its capacity."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.gshard import GShard
from tests import tiny

G, S, D, E = 3, 8, 16, 5


def router(top_k=2, **options):
    choice = configs.choice("gshard", **options)
    model = tiny.config(model__experts=E, model__top_k=top_k, model__router=choice).model
    return GShard(model, nnx.Rngs(params=0), **options)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, parameters, x, valid, key, given):
    return nnx.merge(graph, parameters).route(x, jnp.zeros(valid.shape, jnp.int32), valid, {}, key, given)


def route(made, x, valid, key=None, given=None):
    return run(*nnx.split(made), x, valid, key, given)


def loop(x, valid, kernel, drawn, coefficient):
    """Experts and weights [G, S, 2]; the loss summed over tokens; the gap that the closest decision was made by.

    drawn: numbers uniform in [0, 1), [G, S]."""
    expert, weight = np.full((G, S, 2), -1), np.zeros((G, S, 2))
    loss, gap = 0.0, np.inf
    for g in range(G):
        c, m, tokens = np.zeros(E), np.zeros(E), int(valid[g].sum())
        for s in range(S):
            if not valid[g, s]:
                continue
            gates = np.exp(x[g, s] @ kernel)
            gates /= gates.sum()
            m += gates / tokens
            e1, e2 = np.argsort(-gates)[:2]
            g1, g2 = gates[[e1, e2]] / (gates[e1] + gates[e2])
            c[e1] += 1
            expert[g, s, 0], weight[g, s, 0] = e1, g1
            if 2 * g2 > drawn[g, s]:
                expert[g, s, 1], weight[g, s, 1] = e2, g2
            gap = min(gap, abs(2 * g2 - drawn[g, s]), -np.diff(np.sort(gates)[::-1])[:2].max())
        if tokens:
            loss += tokens * coefficient * E**2 * sum(c[e] / tokens * m[e] for e in range(E)) / E
    return expert, weight, loss, gap


@pytest.fixture(scope="module", params=[False, True], ids=["evaluation", "training"])
def routed(request):
    made = router(balance_loss=0.3)
    key = jax.random.key(7) if request.param else None
    drawn = np.asarray(jax.random.uniform(key, (G, S)), np.float64) if request.param else np.zeros((G, S))
    for seed in itertools.count():
        random = np.random.default_rng(seed)
        x, valid = random.normal(size=(G, S, D)).astype(np.float32), random.random((G, S)) < 0.7
        valid[2] = False
        expected = loop(x.astype(np.float64), valid, np.asarray(made.kernel[...], np.float64), drawn, 0.3)
        if expected[-1] > 1e-4:
            return made, x, valid, key, drawn, expected, route(made, x, valid, key)


def test_choice_weights_and_loss_are_those_of_the_loop(routed):
    _, _, valid, key, _, (expert, weight, loss, _), (choice, losses, statistics) = routed
    np.testing.assert_array_equal(choice.expert, expert)
    tiny.close(choice.weight, weight)
    assert losses["balance_loss"] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_array_equal(statistics["load"], np.bincount(expert[expert >= 0], minlength=E))
    assert ((expert[..., 1] >= 0) == valid).all() == (key is None)  # both cases are there


def test_gradients_of_weights_and_loss_are_finite_differences_of_the_loop(routed):
    made, x, valid, key, drawn, *_ = routed
    random = np.random.default_rng(3)
    back, direction = random.normal(size=(G, S, 2)), random.normal(size=(D, E))
    graph, parameters = nnx.split(made)

    def total_of(parameters):
        choice, losses, _ = run(graph, parameters, x, valid, key, None)
        return (choice.weight * back).sum() + losses["balance_loss"]

    found = jax.grad(total_of)(parameters)["kernel"][...]

    def total(step):
        kernel = np.asarray(made.kernel[...], np.float64) + step * direction
        _, weight, loss, _ = loop(x.astype(np.float64), valid, kernel, drawn, 0.3)
        return (weight * back).sum() + loss

    expected = (total(1e-6) - total(-1e-6)) / 2e-6
    assert (np.asarray(found) * direction).sum() == pytest.approx(expected, rel=1e-3)


def test_the_content_of_padding_changes_nothing(routed):
    made, x, valid, key, _, _, expected = routed
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid, key), expected)


def test_a_recorded_choice_gives_the_same_routing_whether_or_not_the_second_expert_was_taken(routed):
    made, x, valid, key, _, _, own = routed
    tiny.equal(route(made, x, valid, key, own.choice.expert), own)


def test_given_experts_are_taken_with_weights_from_the_tokens(routed):
    made, x, valid, key, _, _, _ = routed
    p = np.exp(x @ np.asarray(made.kernel[...], np.float64))
    best = np.argmax(np.where(np.arange(E) == 3, 0, p), axis=-1)  # of the others
    for second in (1, -1):
        choice, losses, _ = route(made, x, valid, key, jnp.broadcast_to(jnp.array([3, second]), (G, S, 2)))
        np.testing.assert_array_equal(choice.expert, np.where(valid[..., None], [3, second], -1))
        other = p[..., 1] if second == 1 else np.take_along_axis(p, best[..., None], axis=-1)[..., 0]
        tiny.close(choice.weight[..., 0], np.where(valid, p[..., 3] / (p[..., 3] + other), 0))
        assert second == 1 or not np.asarray(choice.weight[..., 1]).any()
        mean = (p / p.sum(axis=-1, keepdims=True))[..., 3]  # f_e is 1 for the third expert alone
        assert losses["balance_loss"] == pytest.approx(0.3 * E * mean[valid].sum(), rel=1e-5)


def test_the_second_expert_is_taken_with_twice_its_weight_as_probability():
    made, tokens = router(), 20_000
    made.kernel[...] = jnp.zeros((D, E)).at[0].set(jnp.array([0.0, 2.0, 1.0, 0.0, 0.0]))
    x = np.zeros((1, tokens, D), np.float32)
    x[..., 0] = 1
    expert = np.asarray(route(made, x, np.ones((1, tokens), bool), jax.random.key(0)).choice.expert)
    assert (expert[..., 0] == 1).all() and set(np.unique(expert[..., 1])) == {-1, 2}
    assert (expert[..., 1] == 2).mean() == pytest.approx(2 / (1 + np.e), abs=4 * np.sqrt(0.25 / tokens))


def test_the_loss_is_its_coefficient_per_token_when_even():
    made = router(balance_loss=0.01)
    made.kernel[...] = jnp.zeros((D, E)).at[:E].set(1e-4 * jnp.eye(E))
    x = np.tile(np.eye(D, dtype=np.float32)[:E], (2, 2, 1))
    losses = route(made, x, np.ones((2, 2 * E), bool)).losses
    assert losses["balance_loss"] / (4 * E) == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("score", [0.0, 1e30, -1e30, np.inf, -np.inf, np.nan])
def test_extreme_scores_give_valid_choices(score):
    made = router()
    made.kernel[...] = jnp.zeros((D, E)).at[:, 0].set(score)
    expert = np.asarray(route(made, np.ones((G, S, D), np.float32), np.ones((G, S), bool)).choice.expert)
    assert ((expert >= 0) & (expert < E)).all() and (expert[..., 0] != expert[..., 1]).all()


def test_another_number_of_choices_is_refused():
    with pytest.raises(UserError, match="model.top_k is 1; the router 'gshard' sends each token to 2 experts"):
        router(top_k=1)
