import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm.models.feed_forward import FeedForward
from tests import tiny
from tests.oracles import moe

D, F = 16, 32


@pytest.mark.parametrize("activation", ["gelu", "geglu", "swiglu"])
def test_a_dense_layer_is_the_loop(activation):
    layer = FeedForward(tiny.config(model__activation=activation).model, F, nnx.Rngs(params=0))
    weights = {name: np.asarray(w, np.float64) for name, w in layer.weights("float32")[0].items()}
    x = np.random.default_rng(0).normal(size=(2, 3, D))
    expected = [[moe.Expert(weights, activation).forward(token) for token in row] for row in x]
    tiny.close(layer(jnp.asarray(x, jnp.float32))[0], np.array(expected))
