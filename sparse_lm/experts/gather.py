"""The same placement as in `einsum`, as indices: rows are gathered into places and out of them, at no FLOPs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.executor import Executor, Experts, count_dropped, run_experts
from sparse_lm.experts.rows import invert_index, take_rows
from sparse_lm.routing import ExpertChoice, TokenChoice, place


def run_gather(
    x: Float[Array, "G S D"], choice: TokenChoice | ExpertChoice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity by indices; see `Executor.run`."""
    if isinstance(choice, TokenChoice):
        return _run_token_choice(x, choice, experts, capacity)
    return _run_expert_choice(x, choice, experts), jnp.zeros(())


def _run_token_choice(x, choice, experts, capacity):
    groups, group_size, top_k = choice.expert.shape
    num_places = experts.num_experts * capacity  # in each group
    with jax.named_scope("dispatch"):
        placement = place(choice, experts.num_experts, capacity)
        # For each choice its place, num_places for a dropped one; for each place its choice, token · K + rank.
        place_of_choice = jnp.where(placement.kept, choice.expert * capacity + placement.position, num_places)
        flat_place_of_choice = place_of_choice.reshape(groups, group_size * top_k)
        choice_in_place = invert_index(flat_place_of_choice, num_places)
        dispatched = take_rows(x, choice_in_place // top_k, place_of_choice)
        dispatched = dispatched.reshape(groups, experts.num_experts, capacity, -1).swapaxes(0, 1)
    outputs = run_experts(experts, dispatched)
    with jax.named_scope("combine"):
        outputs = outputs.swapaxes(0, 1).reshape(groups, num_places, -1)
        outputs = take_rows(outputs, flat_place_of_choice, choice_in_place[..., None])
        outputs = outputs.reshape(groups, group_size, top_k, -1)
        y = jnp.einsum("gskd,gsk->gsd", outputs, choice.weight.astype(x.dtype))
    return y, count_dropped(choice, placement)


def _run_expert_choice(x, choice, experts):
    groups, group_size, width = x.shape
    with jax.named_scope("dispatch"):
        token = jnp.where(choice.token < 0, group_size, choice.token).reshape(groups, -1)  # S for an empty place
        # In float32, since the gradient of a token is the sum over the experts that chose it.
        dispatched = jnp.take_along_axis(x.astype(jnp.float32), token[..., None], axis=1, mode="fill", fill_value=0)
        dispatched = dispatched.astype(x.dtype).reshape(*choice.token.shape, width).swapaxes(0, 1)
    outputs = run_experts(experts, dispatched)
    with jax.named_scope("combine"):
        outputs = outputs.swapaxes(0, 1).astype(jnp.float32) * choice.weight[..., None]
        sum_by_token = lambda rows, token: jnp.zeros((group_size, width)).at[token].add(rows, mode="drop")
        y = jax.vmap(sum_by_token)(outputs.reshape(groups, -1, width), token)
    return y.astype(x.dtype)


gather = Executor(run_gather, (TokenChoice, ExpertChoice))
