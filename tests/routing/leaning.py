"""What the routers that assign a group's tokens together are tested on, and how they are run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def tokens(groups: int, size: int, width: int, seed: int = 0):
    """Tokens that lean towards one direction, so that experts are wanted unevenly; the last group is padding."""
    random = np.random.default_rng(seed)
    valid = random.random((groups, size)) < 0.7
    valid[0], valid[-1] = True, False
    x = random.normal(size=(groups, size, width)) + random.normal(size=width)
    return x.astype(np.float32), valid


@functools.partial(jax.jit, static_argnums=0)
def _run(graph, state, x, valid, key, given):
    return nnx.merge(graph, state).route(x, jnp.zeros(valid.shape, int), valid, {}, key, given)


def route(made, x, valid, key=None, given=None):
    return _run(*nnx.split(made), x, valid, key, given)
