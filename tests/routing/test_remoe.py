import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS
from tests import tiny

G, S, D, E, K = 3, 10, 16, 8, 2
STATE = {"coefficient": jnp.float32(0.3)}


def router(over="group", top_k=K, **options):
    model = tiny.config(model__experts=E, model__top_k=top_k, model__balance_over=over).model
    return create("model.router", ROUTERS, configs.choice("remoe", **options), model, nnx.Rngs(params=0))


def apply(made, kernel, x, valid, given=None, state=STATE):
    graph, _ = nnx.split(made)
    x, valid = jnp.asarray(x), jnp.asarray(valid)
    ids = jnp.zeros(valid.shape, jnp.int32)
    return nnx.merge(graph, nnx.State({"kernel": kernel})).route(x, ids, valid, state, None, given)


def route(made, *args, **kwargs):
    return jax.jit(lambda *args, **kwargs: apply(made, *args, **kwargs))(made.kernel[...], *args, **kwargs)


def inputs(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((G, S)) < 0.7
    valid[2] = False  # a group of padding alone
    return random.normal(size=(G, S, D)).astype(np.float32), valid


def loop(kernel, x, valid, regions):
    """Gates [G, S, E] and the loss with λ = 1, a mean over the tokens of each region times their number."""
    gates = np.zeros((G, S, E))
    for g, t in zip(*np.nonzero(valid)):
        gates[g, t] = np.maximum(x[g, t].astype(np.float64) @ kernel, 0)
    loss = 0.0
    for region in regions:
        rows = [gates[g, t] for g in region for t in range(S) if valid[g, t]]
        for e in range(E):
            f = E / (K * len(rows)) * sum(row[e] > 0 for row in rows) if rows else 0
            loss += sum(f * row[e] for row in rows)
    return gates, loss


@pytest.mark.parametrize("over, regions", [("group", [[0], [1], [2]]), ("batch", [[0, 1, 2]])])
def test_gates_and_loss_are_those_of_the_loop(over, regions):
    made, (x, valid) = router(over), inputs()
    gates, loss = loop(np.asarray(made.kernel[...], np.float64), x, valid, regions)
    choice, losses, statistics = route(made, x, valid)
    for g in range(G):
        for t in range(S):
            order = sorted(np.flatnonzero(gates[g, t]), key=lambda e: -gates[g, t, e])
            assert choice.expert[g, t].tolist() == order + [-1] * (E - len(order))
            np.testing.assert_allclose(choice.weight[g, t, : len(order)], gates[g, t, order], atol=1e-6)
            assert not np.asarray(choice.weight[g, t, len(order) :]).any()
    assert losses == {"l1_loss": pytest.approx(0.3 * loss, rel=1e-5)}
    assert statistics["active"] == statistics["load"].sum() == (gates > 0).sum()
    assert statistics["beyond_bound"] == 0
    assert 0.4 < statistics["active"] / (E * valid.sum()) < 0.6  # at first


@pytest.mark.parametrize("bound, most", [(1.0, 2), (1.25, 3), (3.0, 6), (100.0, 8)])
def test_gates_beyond_the_bound_are_counted_and_pressed_all_the_same(bound, most):
    (x, valid), every = inputs(), route(router(), *inputs())
    choice, losses, statistics = route(router(bound=bound), x, valid)
    tiny.equal(choice.expert, every.choice.expert[..., :most])
    left_out = (np.asarray(every.choice.expert)[..., most:] >= 0).sum()
    assert statistics["beyond_bound"] == left_out
    assert statistics["load"].sum() == every.statistics["load"].sum() - left_out
    assert statistics["active"] == every.statistics["active"]
    assert losses == every.losses


def test_gradients_are_those_of_finite_differences():
    made, (x, valid) = router(), inputs(1)
    dweight = np.random.default_rng(2).normal(size=E)

    def total(kernel):
        choice, losses, _ = apply(made, kernel, x, valid)
        return (choice.weight * jnp.asarray(dweight)[choice.expert]).sum() + losses["l1_loss"]

    def reference(kernel):
        gates, loss = loop(kernel, x, valid, [[0], [1], [2]])
        return (gates * dweight).sum() + 0.3 * loss

    kernel = np.asarray(made.kernel[...], np.float64)
    gradient = np.asarray(jax.jit(jax.grad(total))(made.kernel[...]))
    for d, e in ((0, 0), (3, 5), (15, 7)):
        step = 1e-7 * ((np.arange(D) == d)[:, None] & (np.arange(E) == e))
        difference = (reference(kernel + step) - reference(kernel - step)) / 2e-7
        assert gradient[d, e] == pytest.approx(difference, rel=1e-3, abs=1e-4)


def test_a_gate_of_0_is_no_choice():
    made, (x, valid) = router(), inputs()
    made.kernel[...] = jnp.zeros((D, E))
    choice, losses, statistics = route(made, x, valid)
    assert (np.asarray(choice.expert) == -1).all() and not np.asarray(choice.weight).any()
    assert losses == {"l1_loss": 0}
    assert statistics["unrouted"] == valid.sum()


@pytest.mark.parametrize("size", [1e30, np.inf])
def test_extreme_and_infinite_logits(size):
    made, (x, valid) = router(), inputs()
    made.kernel[...] = jnp.asarray(np.random.default_rng(0).choice([-size, size], (D, E)), jnp.float32)
    chosen = np.asarray(route(made, x, valid).choice.expert)
    assert ((-1 <= chosen) & (chosen < E)).all()
    for row in chosen[valid].tolist():
        named = [e for e in row if e >= 0]
        assert len(set(named)) == len(named)


def test_padding_changes_nothing_and_the_choice_replays():
    made, (x, valid) = router(), inputs()
    expected = route(made, x, valid)
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid), expected)
    tiny.equal(route(made, x, valid, given=expected.choice.expert), expected)


@pytest.mark.parametrize(
    "active, before, after",
    [
        (21, 1e-3, 1.2e-3),  # denser than k = 2 of 10 tokens
        (19, 1e-3, 1e-3 / 1.2),
        (20, 1e-3, 1e-3),
        (0, 1e-8, 1e-8),
        (80, 0.99e8, 1e8),
    ],
)
def test_the_coefficient_follows_the_mean_number_of_experts(active, before, after):
    statistics = {"active": jnp.float32(active), "tokens": jnp.float32(10)}
    updated = router().update({"coefficient": jnp.float32(before)}, statistics)["coefficient"]
    assert updated == pytest.approx(after, rel=1e-5) and updated.shape == ()


def test_training_comes_to_k_experts_a_token():
    """A router alone, taught to have gates that sum to 1. A feature is constant, so that gates can close."""
    made, valid = router("batch", top_k=1), jnp.ones((4, 64), bool)

    def loss(kernel, x, state):
        choice, losses, statistics = apply(made, kernel, x, valid, state=state)
        wanted = ((choice.weight.sum(axis=-1) - 1) ** 2).mean()
        return wanted + losses["l1_loss"] / valid.size, statistics

    def step(carry, key):
        kernel, state = carry
        x = jax.random.normal(key, (4, 64, D)).at[..., -1].set(1)
        gradient, statistics = jax.grad(loss, has_aux=True)(kernel, x, state)
        return (kernel - 0.01 * gradient, made.update(state, statistics)), statistics["active"] / valid.size

    keys = jax.random.split(jax.random.key(0), 400)
    start = (made.kernel[...], made.init_state())
    (_, state), experts = jax.jit(lambda: jax.lax.scan(step, start, keys))()
    assert experts[0] == pytest.approx(E / 2, abs=0.5)
    assert experts[-100:].mean() == pytest.approx(1, abs=0.1)
    assert 1e-3 < state["coefficient"] < 10


def test_training_moves_the_coefficient_once_a_step():
    model = dict(model__layers=2, model__expert_every=1, model__experts=4, model__router=configs.choice("remoe"))
    built = tiny.built(training__accumulation=2, **model)
    state = built.init()
    for seed in range(2):
        state, metrics = built.step(state, tiny.batch(built.config, seed))
    np.testing.assert_allclose(state.router["routed"]["coefficient"], [1.44e-8] * 2, rtol=1e-6)
    assert 0 < metrics["l1_loss"] < 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(coefficient=0.0), "coefficient is 0.0; it must be above 0 and below 1"),
        (dict(coefficient=1.0), "coefficient is 1.0; it must be above 0 and below 1"),
        (dict(multiplier=1.0), "multiplier is 1.0; it must be above 1"),
        (dict(bound=0.5), "bound is 0.5; it must be at least 1"),
        (dict(bound=math.nan), "bound is nan; it must be at least 1"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message):
    with pytest.raises(UserError) as error:
        router(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
