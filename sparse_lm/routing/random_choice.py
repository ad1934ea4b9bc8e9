"""Random: the control that learned routers are measured against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import Router, choose_top, token_choice


class Random(Router):
    """Each token goes to K distinct experts drawn at random, with weight 1/K each.

    While training the key draws. Without one, the draw is a fixed pseudo-random function of the token's `code`: so
    evaluation and generation are repeatable and choose alike. The code differs with the context, so that this does not
    become a hash router by token id, and rounding hardly ever changes it, so that meshes, executors and generation with
    caches agree. Where no context is seen, at the first token of a document, only the token's id is left to differ.
    """

    def route(self, x, ids, valid, state, key=None, replay=None):
        shape = (*valid.shape, self.experts)
        if key is None:
            draw = lambda code: jax.random.uniform(jax.random.fold_in(jax.random.key(0), code), (self.experts,))
            drawn = jax.vmap(jax.vmap(draw))(code(x))
        else:
            drawn = jax.random.uniform(key, shape)
        expert = choose_top(drawn, self.top_k, replay)
        choice = token_choice(expert, jnp.full(expert.shape, 1 / self.top_k), valid)
        return Routing(choice, {}, measure(jnp.zeros(shape), choice, valid, self.over))


def code(x: Float[Array, "G S D"]) -> UInt32[Array, "G S"]:
    """The signs of the first 32 features as the bits of a number."""
    signs = (x[..., :32] > 0).astype(jnp.uint32)
    return (signs << jnp.arange(signs.shape[-1], dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)
