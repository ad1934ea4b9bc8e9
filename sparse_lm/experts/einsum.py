"""Dispatch and combine by masks contracted with einsum, as in Mesh-TensorFlow, GShard and Switch.

Costs G S E C D multiply-adds for each of dispatch and combine, so groups are best kept to some hundreds of tokens.
Every operation is a product, which a mesh of any shape divides well, and every form of choice is a pair of masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.executor import Executor, Experts, by_place, lost
from sparse_lm.routing import Choice, ExpertChoice, SoftSlots, TokenChoice, place

Mask = Float[Array, "G S E C"]


def masks(
    choice: Choice, size: int, experts: int, capacity: int, dtype: jnp.dtype
) -> tuple[Mask, Mask, Float[Array, ""]]:
    """(dispatch, combine, choices that got no place): what each token adds to each place, and takes from it."""
    match choice:
        case TokenChoice():
            placement = place(choice, experts, capacity)
            expert = jax.nn.one_hot(choice.expert, experts, dtype=dtype) * placement.kept[..., None]
            position = jax.nn.one_hot(placement.position, capacity, dtype=dtype)
            dispatch = jnp.einsum("gske,gskc->gsec", expert, position)
            combine = jnp.einsum("gske,gskc->gsec", expert * choice.weight[..., None].astype(dtype), position)
            return dispatch, combine, lost(choice, placement)
        case ExpertChoice(token, weight):
            dispatch = jax.nn.one_hot(token, size, dtype=dtype)
            spread = lambda mask: mask.transpose(0, 3, 1, 2)
            return spread(dispatch), spread(dispatch * weight[..., None].astype(dtype)), jnp.zeros(())
        case SoftSlots(dispatch, combine):
            return dispatch.astype(dtype), combine.astype(dtype), jnp.zeros(())


def run(
    x: Float[Array, "G S D"], choice: Choice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity; a token that got no place has an output of 0."""
    with jax.named_scope("dispatch"):
        dispatch, combine, dropped = masks(choice, x.shape[1], len(experts.weights["into"]), capacity, x.dtype)
        sent = jnp.einsum("gsec,gsd->egcd", dispatch, x)
    returned = by_place(experts, sent)
    with jax.named_scope("combine"):
        return jnp.einsum("gsec,egcd->gsd", combine, returned), dropped


einsum = Executor(run, (TokenChoice, ExpertChoice, SoftSlots))
