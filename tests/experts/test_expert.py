"""One expert against the loop, and its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.experts.expert import ACTIVATIONS, GATED, apply_expert, dropout
from tests import tiny
from tests.oracles import moe

D, F = 6, 5


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_expert_is_the_loop(activation):
    random = np.random.default_rng(0)
    weights = {"into": random.normal(size=(D, F)), "out": random.normal(size=(F, D))}
    if activation in GATED:
        weights["gate"] = random.normal(size=(D, F))
    x = random.normal(size=(2, 3, D))
    expected = [[moe.Expert(weights, activation).forward(token) for token in row] for row in x]
    product = lambda x, name: x @ jnp.asarray(weights[name], jnp.float32)
    found = apply_expert(jnp.asarray(x, jnp.float32), product, activation)
    tiny.close(found, np.array(expected))


def test_dropout_keeps_the_mean_and_is_off_without_a_key():
    x = jnp.ones((200, 200))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_an_expert_is_that_of_its_hidden_units():
    identity = lambda x, name: x
    x, key = jnp.ones((20, 20)), jax.random.key(0)
    found = apply_expert(x, identity, "gelu", 0.25, key)
    tiny.equal(found, dropout(jax.nn.gelu(x), 0.25, key))
    tiny.equal(apply_expert(x, identity, "gelu", 0.25), jax.nn.gelu(x))
