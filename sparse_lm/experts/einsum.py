"""Dispatch and combine by masks contracted with einsum, as in Mesh-TensorFlow, GShard and Switch.

Costs G S E C D multiply-adds for each of dispatch and combine, so groups are best kept to some hundreds of tokens.
Every operation is a product, which a mesh of any shape divides well, and every form of choice is a pair of masks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.executor import Executor, Experts, count_dropped, run_experts
from sparse_lm.routing import Choice, ExpertChoice, SoftSlots, TokenChoice, place

Mask = Float[Array, "G S E C"]


def run_einsum(
    x: Float[Array, "G S D"], choice: Choice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity by masks; see `Executor.run`."""
    with jax.named_scope("dispatch"):
        dispatch, combine, dropped = make_masks(choice, x.shape[1], experts.num_experts, capacity, x.dtype)
        dispatched = jnp.einsum("gsec,gsd->egcd", dispatch, x)
    outputs = run_experts(experts, dispatched)
    with jax.named_scope("combine"):
        return jnp.einsum("gsec,egcd->gsd", combine, outputs), dropped


def make_masks(
    choice: Choice, group_size: int, num_experts: int, capacity: int, dtype: jnp.dtype
) -> tuple[Mask, Mask, Float[Array, ""]]:
    """Writes a choice as masks.

    Args:
        choice: of any form.
        group_size: S.
        num_experts: E.
        capacity: C, the places of each expert in each group.
        dtype: of the masks.

    Returns:
        dispatch [G, S, E, C], what each token adds to each place; combine [G, S, E, C], what each token takes from each
        place; and the number of choices dropped.
    """
    match choice:
        case TokenChoice():
            placement = place(choice, num_experts, capacity)
            expert = jax.nn.one_hot(choice.expert, num_experts, dtype=dtype) * placement.kept[..., None]
            position = jax.nn.one_hot(placement.position, capacity, dtype=dtype)
            dispatch = jnp.einsum("gske,gskc->gsec", expert, position)
            combine = jnp.einsum("gske,gskc->gsec", expert * choice.weight[..., None].astype(dtype), position)
            return dispatch, combine, count_dropped(choice, placement)
        case ExpertChoice(token, weight):
            dispatch = jax.nn.one_hot(token, group_size, dtype=dtype)
            tokens_first = lambda mask: mask.transpose(0, 3, 1, 2)  # [G, E, C, S] to [G, S, E, C]
            return tokens_first(dispatch), tokens_first(dispatch * weight[..., None].astype(dtype)), jnp.zeros(())
        case SoftSlots(dispatch, combine):
            return dispatch.astype(dtype), combine.astype(dtype), jnp.zeros(())


einsum = Executor(run_einsum, (TokenChoice, ExpertChoice, SoftSlots))
