"""Against loops written from section 3 of Roller et al. 2021 (arXiv 2106.04426)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.routing.hash import Hash
from tests import tiny

G, S, D, E, V = 3, 16, 16, 5, 200


def router(top_k=2, experts=E, vocabulary=V, **options):
    choice = configs.choice("hash", **options)
    fields = {"model__experts": experts, "model__top_k": top_k, "model__vocabulary": vocabulary}
    return Hash(tiny.config(model__router=choice, **fields).model, nnx.Rngs(params=0), **options)


@functools.partial(jax.jit, static_argnums=0)
def run(graph, parameters, x, ids, valid, state, key, given):
    return nnx.merge(graph, parameters).route(x, ids, valid, state, key, given)


def route(made, x, ids, valid, key=None, given=None):
    return run(*nnx.split(made), x, ids, valid, made.init_state(), key, given)


def tokens(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((G, S)) < 0.7
    valid[2] = False
    return random.normal(size=(G, S, D)).astype(np.float32), random.integers(0, V, (G, S), dtype=np.int32), valid


def deal(frequency, k, experts):
    """The most frequent id first, each to the k experts of least load."""
    load, table = np.zeros(experts), np.zeros((len(frequency), k), int)
    for i in sorted(range(len(frequency)), key=lambda i: -frequency[i]):
        for place, e in enumerate(sorted(range(experts), key=lambda e: load[e])[:k]):
            table[i, place] = e
        load[table[i]] += frequency[i]
    return table


def cv(load):
    return np.std(load) / np.mean(load)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_a_token_goes_to_the_experts_that_the_table_has_for_its_id(top_k):
    made = router(top_k)
    x, ids, valid = tokens()
    choice, losses, statistics = route(made, x, ids, valid)
    table = np.asarray(made.init_state()["table"])
    for g, s in np.ndindex(G, S):
        assert choice.expert[g, s].tolist() == (table[ids[g, s]].tolist() if valid[g, s] else [-1] * top_k)
        assert choice.weight[g, s].tolist() == [np.float32(1 / top_k) if valid[g, s] else 0] * top_k
    assert losses == {} and nnx.state(made) == {}
    assert statistics["load"].sum() == top_k * valid.sum()


def test_neither_features_nor_a_key_nor_padding_change_the_choice():
    made = router()
    x, ids, valid = tokens()
    expected = route(made, x, ids, valid)
    tiny.equal(route(made, x + 1, ids, valid, key=jax.random.key(0)), expected)
    tiny.equal(route(made, x, np.where(valid, ids, 7), valid), expected)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_random_table_has_distinct_experts_that_are_equally_likely(top_k):
    made = router(top_k, vocabulary=5000)
    table = np.asarray(made.init_state()["table"])
    assert table.shape == (5000, top_k) and table.min() == 0 and table.max() == E - 1
    assert top_k == 1 or (table[:, 0] != table[:, 1]).all()
    assert np.abs(np.bincount(table.ravel()) - 1000 * top_k).max() < 4 * np.sqrt(1000 * top_k)
    tiny.equal(made.init_state(), router(top_k, vocabulary=5000).init_state())
    assert made.update(made.init_state(), {}).keys() == {"table"}


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_balanced_table_is_dealt_once_from_the_counts(top_k):
    made = router(top_k, balanced=True)
    update, state = jax.jit(made.update), made.init_state()
    first, random = state["table"], np.random.default_rng(0)
    seen = np.zeros(V)
    counted = [random.integers(0, 6, V).astype(np.float32) for _ in range(5)]  # 2.5 tokens for each id in each step
    for step, counts in enumerate(counted):
        state = update(state, {"seen": jnp.asarray(counts)})
        before, seen = seen, seen + counts if seen.sum() < 8 * V else seen
        np.testing.assert_array_equal(state["seen"], seen)
        if seen.sum() < 8 * V:
            np.testing.assert_array_equal(state["table"], first)
        else:
            assert step >= 3
            np.testing.assert_array_equal(state["table"], deal(seen + 1, top_k, E))
    assert before.sum() == seen.sum() >= 8 * V  # the last step found the table made
    other = state | {"table": jnp.zeros_like(first)}
    tiny.equal(update(other, {"seen": jnp.asarray(counts)}), other)  # a table that is made stays, whatever it is


def test_layers_are_dealt_their_tables_together():
    """As a decoder calls it: over a leading axis of layers."""
    made = router(1, balanced=True)
    counts = np.random.default_rng(0).integers(0, 30, (2, V)).astype(np.float32)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), made.init_state())
    state = jax.jit(jax.vmap(made.update))(state, {"seen": jnp.asarray(counts)})
    for layer in range(2):
        np.testing.assert_array_equal(state["table"][layer], deal(counts[layer] + 1, 1, E))


def test_the_tokens_counted_are_the_valid_ones():
    made = router(balanced=True)
    x, ids, valid = tokens()
    np.testing.assert_array_equal(route(made, x, ids, valid).statistics["seen"], np.bincount(ids[valid], minlength=V))


def test_a_zipf_stream_is_balanced_within_some_per_cent():
    """Ids in an order that says nothing about their frequency; the load is that of tokens drawn later."""
    vocabulary, experts = 1000, 4  # the most frequent id is 13 % of the tokens
    random = np.random.default_rng(0)
    frequency = random.permutation(1 / np.arange(1, vocabulary + 1))
    frequency /= frequency.sum()
    made = router(1, experts, vocabulary, balanced=True)
    state = made.init_state()
    load = lambda table: np.bincount(table[:, 0], weights=frequency, minlength=experts)
    draw = lambda n: np.bincount(random.choice(vocabulary, n, p=frequency), minlength=vocabulary)
    assert cv(load(np.asarray(state["table"]))) > 0.15
    state = jax.jit(made.update)(state, {"seen": jnp.asarray(draw(8 * vocabulary), jnp.float32)})
    assert cv(load(np.asarray(state["table"]))) < 0.05
    assert np.bincount(np.asarray(state["table"])[:, 0]).min() > vocabulary / experts / 2  # unseen ids spread too


def gate(x, kernel, expert):
    """Weights [..., K]: the square roots of softplus over their sum."""
    score = np.sqrt(np.log1p(np.exp(x @ kernel)))
    score = np.take_along_axis(score, expert, axis=-1)
    return score / score.sum(axis=-1, keepdims=True)


def test_the_gate_weighs_the_experts_of_the_table():
    made, plain = router(gate=True), router()
    x, ids, valid = tokens()
    choice, losses, _ = route(made, x, ids, valid)
    np.testing.assert_array_equal(choice.expert, route(plain, x, ids, valid).choice.expert)
    kernel = np.asarray(made.kernel[...], np.float64)
    wide = x.astype(np.float64)
    expected = lambda kernel: np.where(valid[..., None], gate(wide, kernel, np.maximum(choice.expert, 0)), 0)
    tiny.close(choice.weight, expected(kernel))
    assert losses == {}

    random = np.random.default_rng(3)
    back, direction = random.normal(size=(G, S, 2)), random.normal(size=(D, E))
    graph, parameters = nnx.split(made)
    total = lambda p: (run(graph, p, x, ids, valid, made.init_state(), None, None).choice.weight * back).sum()
    found = (np.asarray(jax.grad(total)(parameters)["kernel"][...]) * direction).sum()
    difference = expected(kernel + 1e-6 * direction) - expected(kernel - 1e-6 * direction)
    assert found == pytest.approx((difference * back).sum() / 2e-6, rel=1e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_given_experts_are_taken_with_weights_from_the_tokens(gated):
    made = router(gate=gated)
    x, ids, valid = tokens()
    own = route(made, x, ids, valid)
    tiny.equal(route(made, x, ids, valid, given=own.choice.expert), own)
    choice, _, _ = route(made, x, ids, valid, given=jnp.broadcast_to(jnp.array([4, 1]), (G, S, 2)))
    np.testing.assert_array_equal(choice.expert, np.where(valid[..., None], [4, 1], -1))
    weight = gate(x, np.asarray(made.kernel[...]), np.full((G, S, 2), [4, 1])) if gated else np.full((G, S, 2), 0.5)
    tiny.close(choice.weight, np.where(valid[..., None], weight, 0))


@pytest.mark.parametrize("score", [0.0, 1e4, -1e4, -1e30])
def test_extreme_scores_of_the_gate_have_finite_weights_and_gradients(score):
    made = router(gate=True)
    made.kernel[...] = jnp.full((D, E), score)
    x, ids, valid = np.ones((G, S, D), np.float32), *tokens()[1:]
    graph, parameters = nnx.split(made)
    total = lambda p: run(graph, p, x, ids, valid, made.init_state(), None, None).choice.weight[..., 0].sum()
    value, gradient = jax.value_and_grad(total)(parameters)
    assert value == valid.sum() / 2  # equal scores weigh the same
    assert np.isfinite(gradient["kernel"][...]).all()
