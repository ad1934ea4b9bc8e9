"""The same placement as `einsum`, as indices: rows are gathered to their places and back, at no FLOPs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.experts.exchange import to_experts, to_groups
from sparse_lm.routing import TokenChoice, place


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


def gather(
    x: Float[Array, "G S D"], choice: TokenChoice, compute: Callable, experts: int, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity; a token that got no place has an output of 0."""
    groups, size, k = choice.expert.shape
    places = experts * capacity
    position, kept = place(choice, experts, capacity)
    to_place = jnp.where(kept, choice.expert * capacity + position, places)  # [G, S, K], `places` for nowhere
    # The inverse: for each place the choice (token · K + rank) that holds it, S · K for an empty place.
    flat = to_place.reshape(groups, size * k)
    holder = jnp.full((groups, places), size * k, flat.dtype)
    holder = jax.vmap(lambda h, p: h.at[p].set(jnp.arange(size * k, dtype=h.dtype), mode="drop"))(holder, flat)

    sent = take_rows(x, holder // k, to_place).reshape(groups, experts, capacity, -1).swapaxes(0, 1)
    returned = to_groups(compute(to_experts(sent))).swapaxes(0, 1).reshape(groups, places, -1)
    back = take_rows(returned, flat, holder[..., None]).reshape(groups, size, k, -1)
    y = jnp.einsum("gskd,gsk->gsd", back, choice.weight.astype(x.dtype))
    return y, ((choice.expert >= 0) & ~kept).sum().astype(jnp.float32)
