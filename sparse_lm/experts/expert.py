"""What one expert computes. A dense feed-forward layer computes the same; only the product with the weights differs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "geglu": jax.nn.gelu,
    "swiglu": jax.nn.silu,
}
GATED = ("geglu", "swiglu")


def apply_expert(
    x: Float[Array, "*N D"],
    product: Callable[[jax.Array, str], jax.Array],
    activation: str,
    dropout_rate: float = 0.0,
    key: jax.Array | None = None,
) -> Float[Array, "*N D"]:
    """Computes out(act(in(x))), or out(act(gate(x)) · in(x)) where gated (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: the inputs, rows of width D in an array of any shape.
        product: product(x, name) multiplies x with the weights of that name ("into", "gate" or "out"), each row with
            those of its own expert.
        activation: a name in `ACTIVATIONS`; the names in `GATED` use the weights "gate".
        dropout_rate: the share of hidden units that dropout zeroes.
        key: for dropout; None, outside training, turns it off.

    Returns:
        The outputs, in the shape of x.
    """
    hidden = product(x, "into")
    activate = ACTIVATIONS[activation]
    hidden = activate(product(x, "gate")) * hidden if activation in GATED else activate(hidden)
    return product(dropout(hidden, dropout_rate, key), "out")


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each entry of x with probability `rate` and divides the others by 1 - rate; without a key, returns x."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
