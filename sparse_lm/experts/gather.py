"""The same placement as `einsum`, as indices: rows are gathered to their places and back, at no FLOPs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.executor import Executor, Experts, by_place, lost
from sparse_lm.experts.rows import inverse, take_rows
from sparse_lm.routing import ExpertChoice, TokenChoice, place


def run(
    x: Float[Array, "G S D"], choice: TokenChoice | ExpertChoice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity; a token that got no place has an output of 0."""
    return (_tokens if isinstance(choice, TokenChoice) else _experts)(x, choice, experts, capacity)


def _tokens(x, choice, experts, capacity):
    groups, size, k = choice.expert.shape
    count = len(experts.weights["into"])
    places = count * capacity
    with jax.named_scope("dispatch"):
        placement = place(choice, count, capacity)
        to_place = jnp.where(placement.kept, choice.expert * capacity + placement.position, places)  # places: nowhere
        flat = to_place.reshape(groups, size * k)
        holder = inverse(flat, places)  # the choice (token · K + rank) that holds each place
        sent = take_rows(x, holder // k, to_place).reshape(groups, count, capacity, -1).swapaxes(0, 1)
    returned = by_place(experts, sent)
    with jax.named_scope("combine"):
        rows = returned.swapaxes(0, 1).reshape(groups, places, -1)
        back = take_rows(rows, flat, holder[..., None]).reshape(groups, size, k, -1)
        y = jnp.einsum("gskd,gsk->gsd", back, choice.weight.astype(x.dtype))
    return y, lost(choice, placement)


def _experts(x, choice, experts, capacity):
    groups, size, width = x.shape
    with jax.named_scope("dispatch"):
        token = jnp.where(choice.token < 0, size, choice.token).reshape(groups, -1)
        # In float32, since the gradient adds up what several experts give back of a token.
        sent = jnp.take_along_axis(x.astype(jnp.float32), token[..., None], axis=1, mode="fill", fill_value=0)
        sent = sent.astype(x.dtype).reshape(*choice.token.shape, width).swapaxes(0, 1)
    returned = by_place(experts, sent)
    with jax.named_scope("combine"):
        rows = returned.swapaxes(0, 1).astype(jnp.float32) * choice.weight[..., None]
        add = lambda rows, token: jnp.zeros((size, width)).at[token].add(rows, mode="drop")
        y = jax.vmap(add)(rows.reshape(groups, -1, width), token)
    return y.astype(x.dtype), jnp.zeros(())


gather = Executor(run, (TokenChoice, ExpertChoice))
