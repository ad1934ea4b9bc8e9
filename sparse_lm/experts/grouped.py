"""Rows sorted by expert and multiplied group by group: no places stay empty, so that none need be dropped.

Gale et al. 2022 (MegaBlocks, arXiv 2211.15841). Over a mesh this is written for one device (`shard_map`): its rows,
sorted by expert, go to the devices on the expert axis that hold their experts, and come back (`exchange`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sparse_lm.experts.exchange import buffer_rows, exchange, plan_exchange
from sparse_lm.experts.executor import Executor, Experts, count_dropped
from sparse_lm.experts.expert import apply_expert
from sparse_lm.experts.rows import invert_index, take_rows
from sparse_lm.kernels import choose_alignment, grouped_matmul
from sparse_lm.mesh import RULES, partition_spec, platform
from sparse_lm.routing import TokenChoice, place, rank


def run_grouped(
    x: Float[Array, "G S D"], choice: TokenChoice, experts: Experts, capacity: int
) -> tuple[Float[Array, "G S D"], Float[Array, ""]]:
    """Applies experts to sorted rows; see `Executor.run`. A capacity of S or more, which drops nothing, costs nothing.

    Over a mesh, rows that overflow a device's buffer (`Experts.buffer`) are dropped too, and counted.
    """
    dropped = jnp.zeros(())
    if capacity < x.shape[1]:
        placement = place(choice, experts.num_experts, capacity)
        dropped = count_dropped(choice, placement)
        choice = choice._replace(expert=jnp.where(placement.kept, choice.expert, -1))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _run_on_device(x, choice.expert, choice.weight, experts, devices=1)[0], dropped

    def run_shard(x, expert, weight, weights, key):
        device = jax.lax.axis_index(mesh.axis_names)
        key = None if key is None else jax.random.fold_in(key, device)
        local_experts = experts._replace(weights=weights, key=key)
        y, overflowed = _run_on_device(x, expert, weight, local_experts, devices=mesh.shape["expert"])
        # The hidden units are divided over the tensor axis; each device has added up its own.
        return jax.lax.psum(y, "tensor"), jax.lax.psum(overflowed, RULES["groups"])

    groups = partition_spec("groups", None, None)
    weights = {name: partition_spec(*axes) for name, axes in experts.axes.items()}
    y, overflowed = jax.shard_map(
        run_shard,
        in_specs=(groups, groups, groups, weights, PartitionSpec()),
        out_specs=(groups, PartitionSpec()),
        check_vma=False,
    )(x, choice.expert, choice.weight, experts.weights, experts.key)
    return y, dropped + overflowed


def _run_on_device(x, expert, weight, experts: Experts, devices: int):
    """Applies experts to the tokens of one device, exchanging rows with the devices that hold the other experts.

    Args:
        x: [g, S, D], the groups of this device.
        expert: [g, S, K], chosen among the E experts of all devices; -1 for none.
        weight: [g, S, K], of each choice.
        experts: the E / P that this device holds.
        devices: P, how many devices the experts are divided over.

    Returns:
        y [g, S, D], and how many choices of these tokens overflowed the buffers of other devices.
    """
    top_k = expert.shape[2]
    aligned = choose_alignment(platform(), expert.size, experts.num_experts)
    with jax.named_scope("dispatch"):
        # With an exchange it is the received rows, sorted again, that are multiplied and need the alignment.
        order = sort_by_expert(expert.reshape(-1), experts.num_experts * devices, 1 if devices > 1 else aligned)
        rows = move_rows(x.reshape(-1, x.shape[-1]), order.row_in_place // top_k, order.place_of_row.reshape(-1, top_k))
        overflowed, sizes = jnp.zeros((), jnp.int32), order.sizes
        if devices > 1:
            buffer_size = buffer_rows(expert.size, devices, experts.buffer)
            plan, received_expert, overflowed = plan_exchange(order.sizes, devices, buffer_size)
            received_order = sort_by_expert(received_expert, experts.num_experts, aligned)
            rows = exchange(rows, plan, buffer_size)
            rows = move_rows(rows, received_order.row_in_place, received_order.place_of_row[:, None])
            sizes = received_order.sizes
    with jax.named_scope("experts"):
        product = lambda rows, name: grouped_matmul(rows, experts.weights[name], sizes, aligned=aligned)
        outputs = apply_expert(rows, product, experts.activation, experts.dropout_rate, experts.key)
    with jax.named_scope("combine"):
        if devices > 1:
            outputs = move_rows(outputs, received_order.place_of_row, received_order.row_in_place[:, None])
            outputs = exchange(outputs, plan.reversed, expert.size)
        outputs = move_rows(outputs, order.place_of_row, order.row_in_place[:, None]).reshape(*expert.shape, -1)
        y = jnp.einsum("gskd,gsk->gsd", outputs, weight.astype(x.dtype))
    return y, overflowed.astype(jnp.float32)


class SortedRows(NamedTuple):
    """Where N rows go among M places that are sorted by expert.

    Attributes:
        place_of_row: the place of each row; M for a row of no expert.
        row_in_place: the row in each place; N for an empty place.
        sizes: the places of each expert, a multiple of the alignment.
    """

    place_of_row: Int[Array, "N"]
    row_in_place: Int[Array, "M"]
    sizes: Int[Array, "E"]


def sort_by_expert(expert: Int[Array, "N"], num_experts: int, aligned: int) -> SortedRows:
    """Sorts rows by expert; those of one expert keep their order.

    Args:
        expert: of each row; -1 for none.
        num_experts: E.
        aligned: each expert's places begin at a multiple of this; see `kernels.choose_alignment`.

    Returns:
        The places of the rows; how many places there are follows from N, E and the alignment alone.
    """
    rows = len(expert)
    count = jnp.bincount(jnp.where(expert < 0, num_experts, expert), length=num_experts)  # leaves out rows of no expert
    sizes = -(-count // aligned) * aligned
    num_places = -(-(rows + min(num_experts, rows) * (aligned - 1)) // aligned) * aligned
    start = jnp.cumsum(sizes) - sizes
    place_of_row = jnp.where(expert < 0, num_places, start[jnp.maximum(expert, 0)] + rank(expert[None], num_experts)[0])
    return SortedRows(place_of_row, invert_index(place_of_row[None], num_places)[0], sizes)


def move_rows(x: Float[Array, "N D"], index: Int[Array, "M"], inverse: Int[Array, "N R"]) -> Float[Array, "M D"]:
    """Takes x[index], as `take_rows` does for one group."""
    return take_rows(x[None], index[None], inverse[None])[0]


grouped = Executor(run_grouped, (TokenChoice,))
