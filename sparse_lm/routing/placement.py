"""Who gets a place: the one file where capacity is enforced (Fedus et al. 2021, section 2.2; GShard, algorithm 1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparse_lm.routing.choice import TokenChoice


class Placement(NamedTuple):
    """position: the place within the chosen expert, 0 to C - 1 where kept. kept: whether the choice got a place."""

    position: Int[Array, "G S K"]
    kept: Bool[Array, "G S K"]


def place(choice: TokenChoice, experts: int, capacity: int) -> Placement:
    """Gives places in the order of the tokens: within a group, first choices before second ones, earlier tokens first.

    A choice of an expert whose C = capacity places are taken is not kept. An expert of -1 takes no place.
    """
    groups, size, k = choice.expert.shape
    queue = choice.expert.swapaxes(1, 2).reshape(groups, k * size)
    named = jax.nn.one_hot(queue, experts, dtype=jnp.int32)
    ahead = ((jnp.cumsum(named, axis=1) - 1) * named).sum(axis=-1)
    position = ahead.reshape(groups, k, size).swapaxes(1, 2)
    return Placement(position, (choice.expert >= 0) & (position < capacity))
