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
    """Gives places within a group: first choices before second ones; then by priority, if the choice has one, the
    highest first (Riquelme et al. 2021, arXiv 2106.05974, section 4.1); then earlier tokens first.

    A choice of an expert whose C = capacity places are taken is not kept. An expert of -1 takes no place.
    """
    groups, size, k = choice.expert.shape
    order = None if choice.priority is None else jnp.argsort(-choice.priority, axis=1)[..., None]
    expert = choice.expert if order is None else jnp.take_along_axis(choice.expert, order, axis=1)
    queue = expert.swapaxes(1, 2).reshape(groups, k * size)
    position = rank(queue, experts).reshape(groups, k, size).swapaxes(1, 2)
    if order is not None:
        position = jnp.take_along_axis(position, jnp.argsort(order, axis=1), axis=1)
    return Placement(position, (choice.expert >= 0) & (position < capacity))


def rank(expert: Int[Array, "G N"], experts: int) -> Int[Array, "G N"]:
    """How many earlier entries of its row name the same expert, for each entry that names one.

    By sorting, whose cost does not grow with the experts as that of counting in one-hot vectors does. Raises
    `ValueError` for more experts times entries than 32 bits can number.
    """
    entries = expert.shape[1]
    if (experts + 1) * entries > 2**32:
        raise ValueError(f"{entries} choices among {experts} experts are too many to sort by 32-bit keys")

    def of_row(expert):
        at = jnp.arange(entries, dtype=jnp.uint32)
        key = jnp.where(expert < 0, experts, expert).astype(jnp.uint32) * entries + at
        key = jnp.sort(key)
        first = jnp.searchsorted(key, jnp.arange(experts + 1, dtype=jnp.uint32) * entries).astype(jnp.uint32)
        return jnp.zeros(entries, jnp.int32).at[key % entries].set((at - first[key // entries]).astype(jnp.int32))

    return jax.vmap(of_row)(expert)
