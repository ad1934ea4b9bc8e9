"""The feed-forward layer, dense or of experts: one computation, with or without a leading axis of experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.mesh import constrain
from sparse_lm.parameter import matrix, weight

ACTIVATIONS = {"gelu": jax.nn.gelu, "geglu": jax.nn.gelu, "swiglu": jax.nn.silu}


class FeedForward(nnx.Module):
    """out(act(in(x))), or out(act(gate(x)) · in(x)) where gated (Shazeer 2020, arXiv 2002.05202), without biases.

    With `experts`, each weight has a leading axis of E experts, and so has the input: [E, …, D] to [E, …, D].
    """

    def __init__(self, model: configs.Model, width: int, rngs: nnx.Rngs, experts: int = 0, dropout: float = 0.0):
        lead, axes = ((experts,), ("experts",)) if experts else ((), ())
        up, down = lead + (model.width, width), lead + (width, model.width)
        make_up = lambda: matrix(rngs, up, axes + ("width", "hidden"), fan_in=model.width, scale=model.init_scale)
        self.into = make_up()
        self.out = matrix(rngs, down, axes + ("hidden", "width"), fan_in=width, scale=model.init_scale)
        self.gate = make_up() if model.gated else None
        self.activation = model.activation
        self.experts, self.dropout = experts, dropout

    def __call__(self, x: Float[Array, "*N D"], key: jax.Array | None = None) -> Float[Array, "*N D"]:
        """Applies the layer; a key turns on dropout of the hidden units."""
        e = "e" if self.experts else ""
        product = lambda x, matrix: jnp.einsum(f"{e}...d,{e}df->{e}...f", x, weight(matrix, x.dtype))
        hidden = product(x, self.into)
        activate = ACTIVATIONS[self.activation]
        hidden = activate(hidden) if self.gate is None else activate(product(x, self.gate)) * hidden
        lead = ("experts", "dispatched_groups") if self.experts else ("batch",)
        hidden = constrain(hidden, *lead, *[None] * (hidden.ndim - len(lead) - 1), "hidden")
        return product(dropout(hidden, self.dropout, key), self.out)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of x and scales the rest; without a key, x itself."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
