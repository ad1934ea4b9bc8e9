"""Sends rows across the mesh's expert axis to the devices of their experts, and back. Runs under `shard_map`.

`jax.lax.ragged_all_to_all` sends them, which jax lacks on a CPU. There `padded_all_to_all` does the same from the same
offsets and sizes, so that the arithmetic of a pod is what the tests run. P is the number of devices on the axis.
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
    """Which rows go from device p to device q: one piece for each pair, [p, q].

    Attributes:
        send_start: where the piece begins among the rows of p.
        receive_start: where it begins in the buffer of q.
        size: its rows.
    """

    send_start: Int[Array, "P P"]
    receive_start: Int[Array, "P P"]
    size: Int[Array, "P P"]

    @property
    def reversed(self) -> "Plan":
        """The plan that returns every row to where it came from."""
        return Plan(self.receive_start.T, self.send_start.T, self.size.T)


def buffer_rows(rows: int, devices: int, factor: float) -> int:
    """Computes how many rows a device's buffer holds: an even share times a factor, at most all rows.

    Args:
        rows: of each device before the exchange, which is an even share after it.
        devices: P.
        factor: `model.exchange_buffer`; from P on, as with inf, the buffer can't overflow.

    Returns:
        The size of the buffer, rounded up.
    """
    return rows * devices if math.isinf(factor) else min(rows * devices, math.ceil(factor * rows))


def plan_exchange(sizes: Int[Array, "E"], devices: int, rows: int) -> tuple[Plan, Int[Array, "rows"], Int[Array, ""]]:
    """Plans to send rows that are sorted by expert to the devices of their experts.

    A device receives its rows in the order of the devices they come from; those that its buffer can't hold are not
    sent.

    Args:
        sizes: this device's rows for each of all E experts.
        devices: P.
        rows: how many rows a device's buffer holds; see `buffer_rows`.

    Returns:
        The plan; the expert of each row in this device's buffer, counted among the experts held here, -1 for no row;
        and how many rows of this device are not sent.
    """
    device, experts_per_device = jax.lax.axis_index(AXIS), len(sizes) // devices
    expert_sizes = jax.lax.all_gather(sizes, AXIS).reshape(devices, devices, experts_per_device)
    wanted = expert_sizes.sum(axis=2)  # [p, q]
    send_start, receive_start = jnp.cumsum(wanted, axis=1) - wanted, jnp.cumsum(wanted, axis=0) - wanted
    size = jnp.clip(rows - receive_start, 0, wanted)
    # The buffer is sorted by sender, then by expert: the rows of each such pair end at `ends`.
    ends, row = jnp.cumsum(expert_sizes[:, device].reshape(-1)), jnp.arange(rows)
    expert = jnp.where(row < ends[-1], jnp.searchsorted(ends, row, side="right") % experts_per_device, -1)
    return Plan(send_start, jnp.minimum(receive_start, rows), size), expert, (wanted - size)[device].sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(x: Float[Array, "N D"], plan: Plan, rows: int) -> Float[Array, "rows D"]:
    """Sends and receives rows as planned. Its gradient is the exchange of the reversed plan.

    Args:
        x: the rows of this device.
        plan: of all devices.
        rows: how many rows this device's buffer holds.

    Returns:
        The buffer, 0 where no row was received.
    """
    device = jax.lax.axis_index(AXIS)
    all_to_all = padded_all_to_all if platform() == "cpu" else jax.lax.ragged_all_to_all
    return all_to_all(
        x,
        jnp.zeros((rows, x.shape[1]), x.dtype),
        plan.send_start[device],
        plan.size[device],
        plan.receive_start[device],
        plan.size[:, device],
        axis_name=AXIS,
    )


def _forward(x, plan, rows):
    return exchange(x, plan, rows), (plan, len(x))


def _backward(rows, saved, gradient):
    plan, sender_rows = saved
    return exchange(gradient, plan.reversed, sender_rows), None


exchange.defvjp(_forward, _backward)


def padded_all_to_all(
    operand: Float[Array, "N D"],
    output: Float[Array, "M D"],
    input_offsets: Int[Array, "P"],
    send_sizes: Int[Array, "P"],
    output_offsets: Int[Array, "P"],
    recv_sizes: Int[Array, "P"],
    *,
    axis_name: str,
) -> Float[Array, "M D"]:
    """Does what `jax.lax.ragged_all_to_all` does, by an all-to-all of pieces padded to the longest possible.

    Args:
        operand: the rows of this device.
        output: what the result holds where no row is received.
        input_offsets: where the piece for each device q begins in the operand.
        send_sizes: the rows of that piece.
        output_offsets: where it begins in the output of q.
        recv_sizes: the rows that come from each device p.
        axis_name: the axis over which the P devices lie.

    Returns:
        The output with the received rows written into it.
    """
    longest = min(len(operand), len(output))
    row = input_offsets[:, None] + jnp.arange(longest)
    pieces = operand.at[jnp.where(jnp.arange(longest) < send_sizes[:, None], row, len(operand))].get(
        mode="fill", fill_value=0
    )
    all_to_all = functools.partial(jax.lax.all_to_all, axis_name=axis_name, split_axis=0, concat_axis=0, tiled=True)
    pieces, offsets = all_to_all(pieces), all_to_all(output_offsets)
    row = jnp.where(jnp.arange(longest) < recv_sizes[:, None], offsets[:, None] + jnp.arange(longest), len(output))
    return output.at[row].set(pieces, mode="drop")
