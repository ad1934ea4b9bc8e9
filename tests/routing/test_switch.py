import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.errors import UserError
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS
from tests import tiny
from tests.oracles import moe

GROUPS, SIZE, D, E = 3, 8, 16, 4


def router(**options):
    model = tiny.config(model__experts=E, model__router=tiny.switch(**options)).model
    return create("model.router", ROUTERS, model.router, model, nnx.Rngs(params=0))


def tokens(seed=0):
    random = np.random.default_rng(seed)
    valid = random.random((GROUPS, SIZE)) < 0.7
    valid[2] = False  # a group of padding alone
    return random.normal(size=(GROUPS, SIZE, D)).astype(np.float32), np.zeros((GROUPS, SIZE), np.int32), valid


def route(made, x, ids, valid, key=None, given=None):
    graph, state = nnx.split(made)
    return jax.jit(lambda *a: nnx.merge(graph, state).route(*a[:3], {}, *a[3:]))(x, ids, valid, key, given)


@pytest.fixture(scope="module")
def routed():
    made = router(balance_loss=0.3, z_loss=0.2)
    x, ids, valid = tokens()
    return made, x, valid, route(made, x, ids, valid)


def loop(made, x, valid, balance=0.3, z=0.2):
    weights = {"into": np.zeros((E, D, 2)), "out": np.zeros((E, 2, D))}
    kernel = np.asarray(made.kernel[...], np.float64)
    return moe.switch(x.astype(np.float64), valid, kernel, weights, "gelu", SIZE, balance, z, np.zeros(x.shape))


def test_the_most_probable_expert_is_chosen_with_its_probability(routed):
    made, x, valid, (choice, _, statistics) = routed
    _, _, expert, *_ = loop(made, x, valid)
    np.testing.assert_array_equal(choice.expert, expert)
    for g, s in zip(*np.nonzero(valid)):
        p = moe.softmax(x[g, s].astype(np.float64) @ np.asarray(made.kernel[...], np.float64))
        assert choice.weight[g, s, 0] == pytest.approx(p.max(), rel=1e-5)
    assert not np.asarray(choice.weight)[~valid].any()
    assert statistics["tokens"] == valid.sum()
    np.testing.assert_array_equal(statistics["load"], np.bincount(expert[expert >= 0], minlength=E))


def test_losses_are_those_of_the_loop(routed):
    made, x, valid, (_, losses, _) = routed
    _, expected, *_ = loop(made, x, valid)
    assert expected.keys() == losses.keys()
    for name, value in expected.items():
        assert losses[name] == pytest.approx(value, rel=1e-5)


def test_the_content_of_padding_changes_nothing(routed):
    made, x, valid, expected = routed
    other = np.where(valid[..., None], x, 1e4).astype(np.float32)
    tiny.equal(route(made, other, np.where(valid, 0, 7).astype(np.int32), valid), expected)


def test_the_balance_loss_is_alpha_per_token_when_even():
    made = router(balance_loss=0.01)
    made.kernel[...] = jnp.zeros((D, E)).at[:E].set(1e-4 * jnp.eye(E))
    x = np.tile(np.eye(D, dtype=np.float32)[:E], (2, 2, 1))  # equal numbers for each expert, all nearly undecided
    _, losses, _ = route(made, x, np.zeros((2, 8), np.int32), np.ones((2, 8), bool))
    assert losses["balance_loss"] / 16 == pytest.approx(0.01, rel=1e-5)


def test_equal_logits_go_to_the_first_expert():
    made = router()
    made.kernel[...] = jnp.zeros((D, E))
    x, ids, _ = tokens()
    choice, _, _ = route(made, x, ids, np.ones((GROUPS, SIZE), bool))
    assert not np.asarray(choice.expert).any()
    np.testing.assert_array_equal(choice.weight, np.full((GROUPS, SIZE, 1), 0.25))


def test_given_experts_are_taken_with_weights_from_the_tokens(routed):
    made, x, valid, (own, _, _) = routed
    given = np.full((GROUPS, SIZE, 1), 3, np.int32)
    choice, _, statistics = route(made, x, np.zeros((GROUPS, SIZE), np.int32), valid, given=given)
    np.testing.assert_array_equal(choice.expert[..., 0], np.where(valid, 3, -1))
    for g, s in zip(*np.nonzero(valid)):
        p = moe.softmax(x[g, s].astype(np.float64) @ np.asarray(made.kernel[...], np.float64))
        assert choice.weight[g, s, 0] == pytest.approx(p[3], rel=1e-5)
    np.testing.assert_array_equal(statistics["load"], [0, 0, 0, valid.sum()])


def test_jitter_multiplies_the_input_while_training_only(routed):
    made = router(jitter=0.3, balance_loss=0.3, z_loss=0.2)
    _, x, valid, without = routed
    ids = np.zeros((GROUPS, SIZE), np.int32)
    tiny.equal(route(made, x, ids, valid), without)
    # A diagonal router: its logits are 4 times the jittered ones of the input.
    made.kernel[...] = 4 * jnp.eye(D)[:, :E]
    run = lambda x, seed: route(made, x, ids, np.ones_like(valid), key=jax.random.key(seed))
    choice, _, statistics = run(np.ones_like(x), 1)
    weight = np.asarray(choice.weight)
    assert weight.max() <= 1 / (1 + 3 * np.exp(-4 * 0.6)) and weight.min() >= 0.25
    # The mean square of a number uniform in 1 ± 0.3 is 1.03.
    assert statistics["logit_square"] / valid.size / 16 == pytest.approx(1.03, abs=0.1)
    assert (weight != run(np.ones_like(x), 2).choice.weight).all()
    assert (np.asarray(run(np.zeros_like(x), 1).choice.weight) == 0.25).all()  # multiplied, not added


def test_the_router_is_in_float32_whatever_the_rest_is(routed):
    made, x, valid, _ = routed
    graph, state = nnx.split(made)
    program = str(jax.make_jaxpr(lambda x: nnx.merge(graph, state).logits(x))(x.astype(jnp.bfloat16)))
    assert "precision=(Precision.HIGHEST, Precision.HIGHEST)" in program.replace("\n", "").replace("  ", "")
    choice, _, _ = route(made, x.astype(jnp.bfloat16), np.zeros((GROUPS, SIZE), np.int32), valid)
    assert choice.weight.dtype == jnp.float32


def test_two_choices_are_refused():
    model = tiny.config(model__experts=E, model__top_k=2).model
    with pytest.raises(UserError, match="model.top_k is 2; the router 'switch' sends each token to 1 expert"):
        create("model.router", ROUTERS, model.router, model, nnx.Rngs(params=0))
