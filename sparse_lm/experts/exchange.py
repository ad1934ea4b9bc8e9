"""Sending tokens to the devices that hold their experts, and back: an all-to-all each over the mesh's expert axis.

Both layouts are pinned on either side, so that the backward pass takes the same way in the other direction.
"""

import jax
from jaxtyping import Array, Float

from sparse_lm.mesh import constrain


def _by_group(x: jax.Array) -> jax.Array:
    return constrain(x, None, "groups", None, None)


def _by_expert(x: jax.Array) -> jax.Array:
    return constrain(x, "experts", "dispatched_groups", None, None)


def to_experts(x: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
    return _by_expert(_by_group(x))


def to_groups(y: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
    return _by_group(_by_expert(y))
