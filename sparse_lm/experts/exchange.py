"""Rows that cross devices of the mesh's expert axis, to where their experts are and back. Runs under `shard_map`.

A TPU sends ragged pieces. Elsewhere `fixed_size` does the same from the same offsets and sizes, so that the arithmetic
of a pod is what the tests run.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.mesh import platform

AXIS = "expert"


class Plan(NamedTuple):
    """Which rows go from device p to device q of the P on the axis.

    start: where they begin on p. arrive: where they begin on q. size: how many.
    """

    start: Int[Array, "P P"]
    arrive: Int[Array, "P P"]
    size: Int[Array, "P P"]

    @property
    def back(self) -> "Plan":
        return Plan(self.arrive.T, self.start.T, self.size.T)


def to_experts(sizes: Int[Array, "E"], devices: int, room: int) -> tuple[Plan, Int[Array, "room"], Int[Array, ""]]:
    """Plans to send rows that are sorted by expert to the devices of their experts.

    sizes: rows of this device for each of all E experts. room: the rows that a device makes room for; what would come
    after is not sent. Returns the plan, the expert of each row received, counted among those here, -1 where none is,
    and how many rows of this device are not sent.
    """
    me, here = jax.lax.axis_index(AXIS), len(sizes) // devices
    counts = jax.lax.all_gather(sizes, AXIS).reshape(devices, devices, here)
    wanted = counts.sum(axis=2)
    start, arrive = jnp.cumsum(wanted, axis=1) - wanted, jnp.cumsum(wanted, axis=0) - wanted
    size = jnp.clip(room - arrive, 0, wanted)
    # Received rows are sorted by device, then by expert: each pair's rows end at `ends`.
    ends, row = jnp.cumsum(counts[:, me].reshape(-1)), jnp.arange(room)
    expert = jnp.where(row < ends[-1], jnp.searchsorted(ends, row, side="right") % here, -1)
    return Plan(start, jnp.minimum(arrive, room), size), expert, (wanted - size)[me].sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(x: Float[Array, "N D"], plan: Plan, rows: int) -> Float[Array, "rows D"]:
    """The rows that the plan brings to this device, 0 where it brings none."""
    me = jax.lax.axis_index(AXIS)
    send = fixed_size if platform() == "cpu" else jax.lax.ragged_all_to_all
    output = jnp.zeros((rows, x.shape[1]), x.dtype)
    return send(x, output, plan.start[me], plan.size[me], plan.arrive[me], plan.size[:, me], axis_name=AXIS)


def _forward(x, plan, rows):
    return exchange(x, plan, rows), (plan, len(x))


def _backward(rows, kept, gradient):
    plan, sent = kept
    return exchange(gradient, plan.back, sent), None


exchange.defvjp(_forward, _backward)


def fixed_size(
    operand: Float[Array, "N D"],
    output: Float[Array, "M D"],
    input_offsets: Int[Array, "P"],
    send_sizes: Int[Array, "P"],
    output_offsets: Int[Array, "P"],
    recv_sizes: Int[Array, "P"],
    *,
    axis_name: str,
) -> Float[Array, "M D"]:
    """`jax.lax.ragged_all_to_all` by an all-to-all of pieces that are as long as they can be.

    operand[input_offsets[q] : + send_sizes[q]] becomes output[output_offsets[q] : + send_sizes[q]] on device q, and
    recv_sizes[p] rows come from device p.
    """
    longest = min(len(operand), len(output))
    row = input_offsets[:, None] + jnp.arange(longest)
    pieces = operand.at[jnp.where(jnp.arange(longest) < send_sizes[:, None], row, len(operand))].get(
        mode="fill", fill_value=0
    )
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)
    pieces, offsets = swap(pieces), swap(output_offsets)
    place = jnp.where(jnp.arange(longest) < recv_sizes[:, None], offsets[:, None] + jnp.arange(longest), len(output))
    return output.at[place].set(pieces, mode="drop")


def room(rows: int, devices: int, factor: float) -> int:
    """Rows to make room for where each of the devices has `rows`: an even share times the factor, at most all of them.

    A factor of inf, or of the number of devices, can't overflow.
    """
    return rows * devices if math.isinf(factor) else min(rows * devices, math.ceil(factor * rows))
