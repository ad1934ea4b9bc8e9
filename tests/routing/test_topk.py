import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.routing import place
from sparse_lm.routing.topk import TopK
from tests import tiny
from tests.oracles import moe

G, S, D, E, K = 3, 10, 16, 5, 2
LOSSES = dict(balance_loss=0.3, z_loss=0.2)


def router(top_k=K, over="group", **options):
    model = tiny.config(model__experts=E, model__top_k=top_k, model__balance_over=over).model
    return TopK(model, nnx.Rngs(params=0), **LOSSES | options)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, parameters, x, valid, key, given):
    return nnx.merge(graph, parameters).route(x, jnp.zeros(valid.shape, jnp.int32), valid, {}, key, given)


def route(made, x, valid, key=None, given=None):
    return run(*nnx.split(made), x, valid, key, given)


def inputs(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((G, S)) < 0.7
    valid[2] = False  # a group of padding alone
    return random.normal(size=(G, S, D)).astype(np.float32), valid


def loop(kernel, x, valid, normalize=True, given=None, k=K):
    """Experts and weights [G, S, K], the largest probabilities [G, S], and both losses summed over tokens."""
    expert, weight, largest = np.full((G, S, k), -1), np.zeros((G, S, k)), np.zeros((G, S))
    balance = z = 0.0
    for g in range(G):
        f, p, tokens = np.zeros(E), np.zeros(E), int(valid[g].sum())
        for s in range(S):
            logits = x[g, s].astype(np.float64) @ kernel
            probability = moe.softmax(logits)
            largest[g, s] = probability.max()
            if not valid[g, s]:
                continue
            expert[g, s] = sorted(range(E), key=lambda e: -logits[e])[:k] if given is None else given[g, s]
            chosen = probability[expert[g, s]]
            weight[g, s] = chosen / chosen.sum() if normalize else chosen
            for e in expert[g, s]:
                f[e] += 1 / (k * tokens)
            p += probability / tokens
            z += np.log(np.exp(logits).sum()) ** 2
        balance += tokens * E * (f @ p)
    return expert, weight, largest, {"balance_loss": 0.3 * balance, "z_loss": 0.2 * z}


def of(made):
    return np.asarray(made.kernel[...], np.float64)


def check(routing, expected):
    expert, weight, _, losses = expected
    np.testing.assert_array_equal(routing.choice.expert, expert)
    tiny.close(routing.choice.weight, weight)
    assert routing.losses == {name: pytest.approx(value, rel=1e-5) for name, value in losses.items()}
    np.testing.assert_array_equal(routing.statistics["load"], np.bincount(expert[expert >= 0], minlength=E))


@pytest.mark.parametrize("k, normalize", [(1, False), (2, True), (2, False), (E, True), (E, False)])
def test_choice_weights_and_losses_are_those_of_the_loop(normalize, k):
    made, (x, valid) = router(k, normalize=normalize), inputs()
    check(route(made, x, valid), loop(of(made), x, valid, normalize, k=k))


@pytest.mark.parametrize("normalize", [True, False])
def test_given_experts_are_taken_with_weights_from_the_tokens(normalize):
    made, (x, valid) = router(normalize=normalize), inputs()
    given = np.argsort(np.random.default_rng(1).random((G, S, E)))[..., :K].astype(np.int32)
    check(route(made, x, valid, given=given), loop(of(made), x, valid, normalize, given))


def test_given_nobody_is_nobody():
    made, (x, valid) = router(normalize=False), inputs()
    given = np.tile(np.array([3, -1], np.int32), (G, S, 1))
    choice = route(made, x, valid, given=given).choice
    np.testing.assert_array_equal(choice.expert, np.where(valid[..., None], given, -1))
    assert not np.asarray(choice.weight)[..., 1].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_finite_differences_of_the_loop(normalize):
    made, (x, valid) = router(normalize=normalize, priority=True), inputs(1)
    random = np.random.default_rng(2)
    back, direction = random.normal(size=(G, S, K)), random.normal(size=(D, E))
    graph, parameters = nnx.split(made)

    def total_of(parameters):
        choice, losses, _ = run(graph, parameters, x, valid, None, None)
        # Priority only orders: nothing flows back through it.
        return (choice.weight * back).sum() + sum(losses.values()) + choice.priority.sum()

    def total(step):
        _, weight, _, losses = loop(of(made) + step * direction, x, valid, normalize)
        return (weight * back).sum() + sum(losses.values())

    found = jax.grad(total_of)(parameters)["kernel"][...]
    expected = (total(1e-6) - total(-1e-6)) / 2e-6
    assert (np.asarray(found) * direction).sum() == pytest.approx(expected, rel=1e-3)


def test_priority_is_the_largest_probability_and_decides_who_is_dropped():
    made, (x, _) = router(priority=True), inputs()
    valid = np.ones((G, S), bool)
    choice = route(made, x, valid).choice
    expert, _, largest, _ = loop(of(made), x, valid)
    tiny.close(choice.priority, largest)
    kept = np.stack([moe.place(expert[g], 3, largest[g]) for g in range(G)])
    np.testing.assert_array_equal(place(choice, E, 3).kept, kept)
    plain = route(router(), x, valid).choice
    assert plain.priority is None
    assert (np.asarray(place(plain, E, 3).kept) != kept).any()
    tiny.equal(choice._replace(priority=None), plain)  # it changes the order alone


def test_padding_changes_nothing_and_takes_no_place():
    made, (x, valid) = router(priority=True), inputs()
    expected = route(made, x, valid)
    # Padding of the highest priority.
    found = route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid)
    kept = valid[..., None]
    compare = lambda r: (r.choice.expert, r.choice.weight, r.losses, r.statistics, place(r.choice, E, 3).kept)
    tiny.equal(compare(found), compare(expected))
    assert not (np.asarray(place(found.choice, E, 3).kept) & ~kept).any()


def test_jitter_multiplies_the_input_while_training_only():
    made, (x, valid) = router(jitter=0.3), inputs()
    tiny.equal(route(made, x, valid), route(router(), x, valid))
    key = jax.random.key(7)
    noise = np.asarray(jax.random.uniform(key, x.shape, minval=0.7, maxval=1.3))
    check(route(made, x, valid, key), loop(of(made), x * noise, valid))


def test_balance_over_the_batch_is_that_of_one_large_group():
    x, valid = inputs()
    one = route(router(), x.reshape(1, G * S, D), valid.reshape(1, G * S)).losses
    tiny.close(route(router(over="batch"), x, valid).losses, one)


def test_equal_logits_go_to_the_first_experts():
    made, (x, _) = router(), inputs()
    made.kernel[...] = jnp.zeros((D, E))
    choice = route(made, x, np.ones((G, S), bool)).choice
    np.testing.assert_array_equal(choice.expert, np.broadcast_to([0, 1], (G, S, K)))
    np.testing.assert_array_equal(choice.weight, np.full((G, S, K), 0.5))
