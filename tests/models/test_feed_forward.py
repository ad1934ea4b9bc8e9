import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models.feed_forward import FeedForward, dropout
from tests import tiny
from tests.oracles import moe

D, F = 16, 32


@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
def test_a_dense_layer_is_the_loop(activation):
    layer = FeedForward(tiny.config(model__activation=activation).model, F, nnx.Rngs(params=0))
    weights = {name: np.asarray(w, np.float64) for name, w in layer.weights("float32")[0].items()}
    x = np.random.default_rng(0).normal(size=(2, 3, D))
    expected = [[moe.Expert(weights, activation).forward(token) for token in row] for row in x]
    tiny.close(layer(jnp.asarray(x, jnp.float32)), np.array(expected))


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
