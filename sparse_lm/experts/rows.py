"""Moving rows by index, with gradients that move them back by index too."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def take_rows(
    x: Float[Array, "G N D"], index: Int[Array, "G M"], inverse: Int[Array, "G N R"]
) -> Float[Array, "G M D"]:
    """x[g, index[g, m]], and 0 where the index is N or above.

    inverse[g, n] lists the m that took row n, padded with M, so that the gradient is a gather too; the scatter that it
    would otherwise be is many times slower on every platform.
    """
    return jnp.take_along_axis(x, index[..., None], axis=1, mode="fill", fill_value=0)


def _forward(x, index, inverse):
    return take_rows(x, index, inverse), inverse


def _backward(inverse, gradient):
    groups, rows, repeats = inverse.shape
    taken = jnp.take_along_axis(
        gradient, inverse.reshape(groups, rows * repeats)[..., None], axis=1, mode="fill", fill_value=0
    )
    return taken.reshape(groups, rows, repeats, -1).sum(axis=2), None, None


take_rows.defvjp(_forward, _backward)


def inverse(index: Int[Array, "G N"], places: int) -> Int[Array, "G places"]:
    """For each place the n with index[g, n] equal to it, N where there is none. No place may be named twice."""
    groups, rows = index.shape
    holder = jnp.full((groups, places), rows, index.dtype)
    return jax.vmap(lambda h, p: h.at[p].set(jnp.arange(rows, dtype=h.dtype), mode="drop"))(holder, index)
