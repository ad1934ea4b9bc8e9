"""Dispatch and combine by one-hot masks contracted with einsum, as in Mesh-TensorFlow, GShard and Switch.

Costs G S E C D multiply-adds for each of dispatch and combine, so groups are best kept to some hundreds of tokens.
Every operation is a product, which a mesh of any shape divides well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.exchange import to_experts, to_groups
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

    sent = to_experts(jnp.einsum("gsec,gsd->egcd", dispatch, x))
    returned = to_groups(compute(sent))
    y = jnp.einsum("gsec,egcd->gsd", combine, returned)
    return y, ((choice.expert >= 0) & ~kept).sum().astype(jnp.float32)
