import itertools

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

G, S, D, E, K = 3, 10, 16, 8, 3
SCORES = {
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(),
}


def router(experts=E, top_k=K, over="group", **options):
    model = tiny.config(model__experts=experts, model__top_k=top_k, model__balance_over=over).model
    return create("model.router", ROUTERS, configs.choice("deepseek", **options), model, nnx.Rngs(params=0))


def apply(made, kernel, x, valid, bias, given=None):
    graph, _ = nnx.split(made)
    x, valid, bias = jnp.asarray(x), jnp.asarray(valid), jnp.asarray(bias, jnp.float32)
    ids = jnp.zeros(valid.shape, jnp.int32)
    return nnx.merge(graph, nnx.State({"kernel": kernel})).route(x, ids, valid, {"bias": bias}, None, given)


def route(made, *args, **kwargs):
    return jax.jit(lambda *args, **kwargs: apply(made, *args, **kwargs))(made.kernel[...], *args, **kwargs)


def inputs(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((G, S)) < 0.7
    valid[2] = False  # a group of padding alone
    return random.normal(size=(G, S, D)).astype(np.float32), valid, random.normal(scale=0.2, size=E)


def loop(kernel, x, valid, bias, score, normalize=True, scale=1.0, groups=1, groups_kept=1):
    """Choice, weights and balance loss with α = 1, summed over tokens, from the text of section 2.1.2."""
    experts = kernel.shape[1]
    expert, weight, loss = np.full((G, S, K), -1), np.zeros((G, S, K)), 0.0
    for g in range(G):
        f, p, tokens = np.zeros(experts), np.zeros(experts), valid[g].sum()
        for t in np.flatnonzero(valid[g]):
            s = SCORES[score](x[g, t].astype(np.float64) @ kernel)
            size = experts // groups
            sums = [sum(sorted((s + bias)[n * size : (n + 1) * size])[-2:]) for n in range(groups)]
            best = sorted(range(groups), key=lambda n: -sums[n])[:groups_kept]
            allowed = [e for e in range(experts) if e // size in best]
            expert[g, t] = sorted(allowed, key=lambda e: -(s[e] + bias[e]))[:K]
            weight[g, t] = scale * s[expert[g, t]] / (s[expert[g, t]].sum() if normalize else 1)
            f[sorted(range(experts), key=lambda e: -s[e])[:K]] += experts / (K * tokens)
            p += s / s.sum() / tokens
        loss += tokens * (f * p).sum()
    return expert, weight, loss


CASES = {
    "V3": dict(score="sigmoid", scale=2.5),
    "V3 in groups": dict(score="sigmoid", groups=4, groups_kept=2),
    "V4": dict(score="sqrt_softplus", scale=1.5),
    "DeepSeekMoE": dict(score="softmax", normalize=False, groups=2),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_choice_weights_and_loss_are_those_of_the_loop(options):
    made = router(sequence_loss=0.3, **options)
    x, valid, bias = inputs()
    expert, weight, loss = loop(np.asarray(made.kernel[...], np.float64), x, valid, bias, **options)
    choice, losses, statistics = route(made, x, valid, bias)
    np.testing.assert_array_equal(choice.expert, expert)
    np.testing.assert_allclose(choice.weight, weight, rtol=2e-5)
    assert losses == {"sequence_loss": pytest.approx(0.3 * loss, rel=1e-5)}
    np.testing.assert_array_equal(statistics["load"], np.bincount(expert[expert >= 0], minlength=E))


def test_the_balance_loss_is_that_of_each_group_whatever_balance_is_over():
    one, other = (route(router(over=over), *inputs()).losses for over in ("group", "batch"))
    assert one == other


def test_the_bias_decides_but_does_not_weigh():
    made, (x, valid, _) = router(), inputs()
    for e in (2, 7):
        choice, _, _ = route(made, x, valid, 10.0 * (np.arange(E) == e))
        assert (np.asarray(choice.expert)[..., 0] == np.where(valid, e, -1)).all()
    np.testing.assert_allclose(np.asarray(choice.weight).sum(axis=-1), valid, rtol=1e-6)


def test_experts_are_of_the_groups_with_the_best_pairs():
    """One excellent expert does not make up for a poor second one, and a negative sum can win."""
    made = router(experts=6, top_k=2, groups=3)
    made.kernel[...] = jnp.zeros((D, 6))
    x = np.ones((1, 1, D), np.float32)
    choose = lambda bias: route(made, x, np.ones((1, 1), bool), bias)[0].expert[0, 0].tolist()
    assert choose([0.9, -0.9, 0.1, 0.2, -0.2, 0.3]) == [3, 2]
    assert choose([-9, -9, -8, -7, -9, -9]) == [3, 2]


@pytest.mark.parametrize("score", SCORES)
def test_gradients_are_those_of_finite_differences(score):
    made = router(score=score, sequence_loss=1.0)
    x, valid, bias = inputs(1)
    given = route(made, x, valid, bias).choice.expert
    dweight = np.random.default_rng(2).normal(size=given.shape)

    def total(kernel):
        choice, losses, _ = apply(made, kernel, x, valid, bias, given)
        return (choice.weight * dweight).sum() + losses["sequence_loss"]

    kernel = np.asarray(made.kernel[...], np.float64)

    def reference(kernel):
        expert, weight, loss = loop(kernel, x, valid, bias, score)
        return (weight * dweight).sum() + loss

    gradient = jax.jit(jax.grad(total))(made.kernel[...])
    for d, e in ((0, 0), (3, 5), (15, 7)):
        step = 1e-6 * ((np.arange(D) == d)[:, None] & (np.arange(E) == e))
        assert gradient[d, e] == pytest.approx(
            (reference(kernel + step) - reference(kernel - step)) / 2e-6, rel=1e-3, abs=1e-4
        )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("size", [0.0, 1e3, 1e30])
def test_equal_and_extreme_logits(score, size):
    made = router(score=score, groups=4, groups_kept=2)
    made.kernel[...] = jnp.asarray(size * np.random.default_rng(0).choice([-1.0, 1.0], (D, E)), jnp.float32)
    x, valid, _ = inputs()

    def total(x):
        choice, losses, _ = apply(made, made.kernel[...], x, valid, np.zeros(E))
        return (choice.weight**2).sum() + losses["sequence_loss"], choice

    (_, choice), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    chosen = np.asarray(choice.expert)[valid]
    assert ((0 <= chosen) & (chosen < E)).all() and all(len(set(row)) == K for row in chosen.tolist())
    assert np.isfinite(choice.weight).all() and np.isfinite(gradient).all()


def test_padding_changes_nothing_and_the_choice_replays():
    made, (x, valid, bias) = router(groups=2), inputs()
    expected = route(made, x, valid, bias)
    tiny.equal(route(made, np.where(valid[..., None], x, 1e4).astype(np.float32), valid, bias), expected)
    tiny.equal(route(made, x, valid, bias, given=expected.choice.expert), expected)


def test_one_expert_has_weight_1_and_no_gradient():
    made = router(experts=1, top_k=1, sequence_loss=0.0)
    x, valid, _ = inputs()
    weight = lambda x: apply(made, made.kernel[...], x, valid, np.zeros(1)).choice.weight
    np.testing.assert_array_equal(weight(x)[..., 0], valid)
    assert not np.asarray(jax.jit(jax.grad(lambda x: weight(x).sum()))(x)).any()


def test_the_bias_grows_where_the_load_is_below_the_mean():
    made = router(experts=4, top_k=2, bias_rate=0.01)
    state = {"bias": jnp.array([0.5, 0.0, -0.5, 0.0])}
    after = made.update(state, {"load": jnp.array([9.0, 1.0, 5.0, 5.0])})
    np.testing.assert_allclose(after["bias"], [0.49, 0.01, -0.5, 0.0], rtol=1e-6)
    assert not np.asarray(made.init_state()["bias"]).any()


def test_the_bias_balances_a_skewed_stream():
    """Expert e's logit is normal with mean e / 4; the router's weights stay."""
    made = router(top_k=2, bias_rate=0.005)
    made.kernel[...] = jnp.eye(D, E).at[-1].set(jnp.arange(E) / 4)
    valid = np.ones((8, 512), bool)

    def step(state, key, rate):
        x = jax.random.normal(key, (8, 512, D)).at[..., -1].set(1)
        load = apply(made, made.kernel[...], x, valid, state["bias"]).statistics["load"]
        after = made.update(state, {"load": load})
        return jax.tree.map(lambda old, new: old + rate * (new - old), state, after), load.std() / load.mean()

    keys = jax.random.split(jax.random.key(0), 200)
    run = jax.jit(lambda rate: jax.lax.scan(lambda state, key: step(state, key, rate), made.init_state(), keys)[1])
    assert run(0.0).min() > 0.5
    assert run(1.0)[-50:].max() < 0.1


def after_steps(count, **fields):
    """A small model, its state after some steps, and the biases after each."""
    router = configs.choice("deepseek", bias_rate=0.01)
    layers = dict(model__layers=1, model__expert_every=1, model__experts=4, model__top_k=2, model__router=router)
    built = tiny.built(**layers, **fields)
    state, biases = built.init(), [np.zeros((1, 4))]
    for seed in range(count):
        state, _ = built.step(state, tiny.batch(built.config, seed))
        biases.append(np.asarray(state.router["routed"]["bias"]))
    return built, state, biases


def test_the_bias_changes_once_a_step_and_not_in_evaluation():
    built, state, biases = after_steps(3, training__accumulation=2)
    for before, after in itertools.pairwise(biases):
        moved = np.abs(after - before)
        assert moved.any() and (np.isclose(moved, 0.01, atol=1e-7) | (moved == 0)).all()
    built.evaluate(state.parameters, state.router, {k: v[:2] for k, v in tiny.batch(built.config).items()})
    tiny.equal(state.router["routed"]["bias"], biases[-1])


def test_the_bias_is_the_same_over_microbatches():
    tiny.equal(after_steps(1, training__accumulation=2)[2], after_steps(1)[2])


@pytest.mark.parametrize(
    "fields, options, message",
    [
        ({}, dict(score="sigmiod"), "model.router.options.score is 'sigmiod'; did you mean 'sigmoid'?"),
        ({}, dict(groups=3), "groups is 3, which does not divide model.experts=8"),
        ({}, dict(groups=0), "groups is 0; it must be at least 1"),
        ({}, dict(groups=8, groups_kept=4), "groups is 8 of 1 expert each"),
        ({}, dict(groups=2, groups_kept=3), "groups_kept is 3; it must be 1 to groups=2"),
        ({}, dict(groups_kept=0), "groups_kept is 0; it must be at least 1"),
        ({}, dict(groups=4), "model.top_k is 3, above the 2 experts of groups_kept=1 groups"),
    ],
)
def test_what_does_not_fit_is_one_line(fields, options, message):
    with pytest.raises(UserError) as error:
        router(**fields, **options)
    assert message in str(error.value) and "\n" not in str(error.value)
