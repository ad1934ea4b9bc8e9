"""The device mesh, and one table from the axes of arrays to the axes of the mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm.errors import DoesNotFit

AXES = ("data", "fsdp", "expert", "tensor")

# Rows and routing groups are divided over three axes. An expert layer sends each group's tokens to the devices that
# hold their experts: the expert axis then divides the experts, and the groups stay divided over the other two.
RULES: dict[str | None, tuple[str, ...]] = {
    None: (),
    "batch": ("data", "fsdp", "expert"),
    "groups": ("data", "fsdp", "expert"),
    "dispatched_groups": ("data", "fsdp"),
    "layers": (),
    "experts": ("expert",),
    "width": ("fsdp",),
    "hidden": ("tensor",),
    "heads": ("tensor",),
    "head_width": (),
    # A look-up in a table divided by width makes the partitioner replicate it, so the table is divided by token alone.
    "vocabulary": ("fsdp", "tensor"),
    "logits": ("tensor",),
    "table_width": (),
    "norm": (),
    "router_experts": (),
    "slots": (),
    "blocks": (),
    "block_in": ("fsdp",),
    "block_out": (),
}


def make_mesh(mesh: configs.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Makes a mesh with the axes `AXES`.

    Args:
        mesh: the size of each axis.
        devices: to lay out; None: those of all processes.

    Raises:
        DoesNotFit: if the product of the sizes is not the number of devices.
        UserError: for an invalid size.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(mesh, axis) for axis in AXES]
    written = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    configs.check_mesh(mesh)
    product = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % product == 0:
        sizes[sizes.index(-1)] = len(devices) // product
    elif -1 in sizes or product != len(devices):
        raise DoesNotFit(
            f"{written} needs {'a multiple of ' if -1 in sizes else ''}{product} devices; there are {len(devices)}"
        )
    if devices[0].platform == "tpu":  # neighbours in the mesh are neighbours on the torus
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """Returns cpu, gpu or tpu: the platform of the active mesh (maybe an abstract one), otherwise jax's default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def partition_spec(*axes: str | None) -> PartitionSpec:
    """Maps the axes of an array to mesh axes by `RULES`; None is not divided."""
    return PartitionSpec(*(RULES[axis] or None for axis in axes))


def sharding(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, *axes: str | None) -> NamedSharding:
    """Builds the sharding of an array with these axes over a mesh; see `partition_spec`."""
    return NamedSharding(mesh, partition_spec(*axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Lays out x over the active mesh (`jax.set_mesh`) as its axes say; without a mesh, returns x."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(*axes))
