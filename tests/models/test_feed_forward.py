import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models.feed_forward import FeedForward, dropout
from tests import tiny
from tests.oracles import moe

D, F = 16, 32


def made(activation, experts=0):
    model = tiny.config(model__activation=activation).model
    return FeedForward(model, F, nnx.Rngs(params=0), experts)


def weights(layer, expert=...):
    names = ["into", "out"] + ["gate"] * (layer.gate is not None)
    return {name: np.asarray(getattr(layer, name)[...], np.float64)[expert] for name in names}


@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
def test_a_dense_layer_is_the_loop(activation):
    layer = made(activation)
    x = np.random.default_rng(0).normal(size=(2, 3, D))
    expected = [[moe.Expert(weights(layer), activation).forward(token) for token in row] for row in x]
    tiny.close(layer(jnp.asarray(x, jnp.float32)), np.array(expected))


def test_each_expert_computes_with_its_own_weights():
    layer = made("geglu", experts=3)
    x = np.random.default_rng(0).normal(size=(3, 2, 4, D))
    run = lambda e, token: moe.Expert(weights(layer, e), "geglu").forward(token)
    expected = [[[run(e, token) for token in group] for group in x[e]] for e in range(3)]
    tiny.close(layer(jnp.asarray(x, jnp.float32)), np.array(expected))


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
