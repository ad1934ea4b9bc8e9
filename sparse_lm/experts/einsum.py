"""Dispatch and combine by one-hot masks contracted with einsum, as in Mesh-TensorFlow, GShard and Switch.

Costs G S E C D multiply-adds for each of dispatch and combine, so groups are best kept to some hundreds of tokens.
Every operation is a product, which a mesh of any shape divides well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.mesh import constrain
from sparse_lm.routing import TokenChoice, place


def einsum(
    x: Float[Array, "G S D"], choice: TokenChoice, compute: Callable, experts: int, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity; a token that got no place has an output of 0."""
    position, kept = place(choice, experts, capacity)
    expert_mask = jax.nn.one_hot(choice.expert, experts, dtype=x.dtype) * kept[..., None]
    place_mask = jax.nn.one_hot(position, capacity, dtype=x.dtype)
    dispatch = jnp.einsum("gske,gskc->gsec", expert_mask, place_mask)
    combine = jnp.einsum("gske,gskc->gsec", expert_mask * choice.weight[..., None].astype(x.dtype), place_mask)

    # From here to the second constraint the expert axis of the mesh divides experts, not groups: two all-to-alls.
    sent = constrain(jnp.einsum("gsec,gsd->egcd", dispatch, x), "experts", "dispatched_groups", None, None)
    returned = constrain(compute(sent), None, "groups", None, None)
    y = jnp.einsum("gsec,egcd->gsd", combine, returned)
    return y, ((choice.expert >= 0) & ~kept).sum().astype(jnp.float32)
