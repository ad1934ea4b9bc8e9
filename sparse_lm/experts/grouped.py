"""Tokens sorted by expert and multiplied group by group: no places stay empty, so that nothing need be dropped.

Gale et al. 2022 (MegaBlocks, arXiv 2211.15841). Over a mesh this is written for one device (`shard_map`): its tokens,
sorted by expert, go to the devices of the expert axis that hold their experts, and come back (`exchange`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sparse_lm.experts.exchange import exchange, room, to_experts
from sparse_lm.experts.executor import Executor, Experts, lost
from sparse_lm.experts.rows import inverse, take_rows
from sparse_lm.kernels import alignment, grouped_matmul
from sparse_lm.mesh import RULES, platform, spec
from sparse_lm.routing import TokenChoice, place, rank


def run(
    x: Float[Array, "G S D"], choice: TokenChoice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts under a capacity, which costs nothing to be without; a token that got no place has output 0."""
    dropped = jnp.zeros(())
    if capacity < x.shape[1]:
        placement = place(choice, len(experts.weights["into"]), capacity)
        dropped = lost(choice, placement)
        choice = choice._replace(expert=jnp.where(placement.kept, choice.expert, -1))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _one_device(x, choice.expert, choice.weight, experts.weights, experts.key, experts, 1)[0], dropped

    def local(x, expert, weight, weights, key):
        device = jax.lax.axis_index(mesh.axis_names)
        key = None if key is None else jax.random.fold_in(key, device)
        y, overflowed = _one_device(x, expert, weight, weights, key, experts, mesh.shape["expert"])
        # The hidden units are divided over the tensor axis; each device has added up its own.
        return jax.lax.psum(y, "tensor"), jax.lax.psum(overflowed, RULES["groups"])

    groups = spec("groups", None, None)
    weights = {name: spec(*axes) for name, axes in experts.axes.items()}
    y, overflowed = jax.shard_map(
        local,
        in_specs=(groups, groups, groups, weights, PartitionSpec()),
        out_specs=(groups, PartitionSpec()),
        check_vma=False,
    )(x, choice.expert, choice.weight, experts.weights, experts.key)
    return y, dropped + overflowed


class Sorted(NamedTuple):
    """Where N rows go among M that are sorted by expert.

    to: for each row its place, M for a row of nobody's. row: for each place its row, N for an empty one. sizes: places
    of each expert, a multiple of the alignment.
    """

    to: Int[Array, "N"]
    row: Int[Array, "M"]
    sizes: Int[Array, "E"]


def sort(expert: Int[Array, "N"], experts: int, aligned: int) -> Sorted:
    """Sorts rows by expert, in their own order within one; each expert's places begin at a multiple of `aligned`."""
    rows = len(expert)
    count = jnp.bincount(jnp.where(expert < 0, experts, expert), length=experts)  # drops what is nobody's
    sizes = -(-count // aligned) * aligned
    places = -(-(rows + min(experts, rows) * (aligned - 1)) // aligned) * aligned
    start = jnp.cumsum(sizes) - sizes
    to = jnp.where(expert < 0, places, start[jnp.maximum(expert, 0)] + rank(expert[None], experts)[0])
    return Sorted(to, inverse(to[None], places)[0], sizes)


def _one_device(x, expert, weight, weights, key, experts: Experts, devices: int):
    """The rows of one device: x [g, S, D] with experts 0 to E - 1 of all `devices` of the expert axis, and `weights` of
    the E / devices experts that are here. Returns y, and the choices that a device had no room for."""
    size, k = expert.shape[1:]
    here = len(weights["into"])
    aligned = alignment(platform(), expert.size, here)
    with jax.named_scope("dispatch"):
        away = sort(expert.reshape(-1), here * devices, 1 if devices > 1 else aligned)
        sent = move(x.reshape(-1, x.shape[-1]), away.row // k, away.to.reshape(-1, k))
        overflowed, sizes = jnp.zeros((), jnp.int32), away.sizes
        if devices > 1:
            limit = room(expert.size, devices, experts.buffer)
            plan, owner, overflowed = to_experts(away.sizes, devices, limit)
            local = sort(owner, here, aligned)
            sent, sizes = move(exchange(sent, plan, limit), local.row, local.to[:, None]), local.sizes
    with jax.named_scope("experts"):
        product = lambda x, name: grouped_matmul(x, weights[name], sizes, aligned=aligned)
        y = experts.layer(sent, product, key)
    with jax.named_scope("combine"):
        if devices > 1:
            y = exchange(move(y, local.to, local.row[:, None]), plan.back, expert.size)
        back = move(y, away.to, away.row[:, None]).reshape(*expert.shape, -1)
        y = jnp.einsum("gskd,gsk->gsd", back, weight.astype(x.dtype))
    return y, overflowed.astype(jnp.float32)


def move(x: Float[Array, "N D"], index: Int[Array, "M"], inverse: Int[Array, "N R"]) -> Float[Array, "M D"]:
    return take_rows(x[None], index[None], inverse[None])[0]


grouped = Executor(run, (TokenChoice,))
