"""The device mesh, and one table from the axes of arrays to the axes of the mesh."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm.cost.arrays import of_blocks
from sparse_lm.cost.routers import skips_layers
from sparse_lm.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")

# Rows and routing groups are divided over three axes. An expert layer sends each group's tokens to the devices that
# hold their experts: the expert axis then divides the experts, and the groups stay divided over the other two.
RULES: dict[str, tuple[str, ...]] = {
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
    """A mesh with the axes data, fsdp, expert and tensor over the devices (by default all of all processes).

    Raises `UserError` when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(mesh, axis) for axis in AXES]
    written = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"{written}: each must be at least 1, and one of them may be -1 to take what is left")
    product = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % product == 0:
        sizes[sizes.index(-1)] = len(devices) // product
    elif -1 in sizes or product != len(devices):
        raise UserError(
            f"{written} needs {'a multiple of ' if -1 in sizes else ''}{product} devices; there are {len(devices)}"
        )
    if devices[0].platform == "tpu":  # neighbours in the mesh are neighbours on the torus
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)
    return jax.sharding.Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(config: configs.Config, mesh: jax.sharding.Mesh) -> None:
    """Raises `UserError` for a size of the config that an axis of the mesh does not divide."""
    model, training = config.model, config.training
    batch = training.batch // training.accumulation
    checks = [
        ("batch", "training.batch / training.accumulation", batch),
        ("width", "model.width", model.width),
        ("heads", "model.kv_heads", model.kv_heads),
        ("vocabulary", "model.vocabulary", model.vocabulary),
        ("hidden", "model.expert_width", model.expert_width),
    ]
    if model.dense_first or model.expert_every > 1:
        checks.insert(-1, ("hidden", "model.ffn_width", model.ffn_width))
    if blocks := of_blocks(model, model.layers - 1):
        checks.append(("block_in", "model.layout.options.block", blocks[0][1]))
    if model.experts:
        groups = batch * config.data.length // model.group_size
        if not skips_layers(model):
            checks.append(("experts", "model.experts", model.experts))
        checks.append(
            ("groups", "the number of routing groups in a step (rows × data.length / model.group_size)", groups)
        )
    for axis, name, size in checks:
        parts = int(np.prod([mesh.shape[m] for m in RULES[axis]]))
        if size % parts:
            near = max(parts, round(size / parts) * parts)
            across = " × ".join(f"mesh.{m}={mesh.shape[m]}" for m in RULES[axis])
            raise UserError(f"{name} is {size}, which {across} does not divide; the nearest that would do is {near}")


def platform() -> str:
    """cpu, gpu or tpu: of the mesh in force, whose devices need not be here; without one, of jax's default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def spec(*axes: str | None) -> PartitionSpec:
    """The partitioning of an array with these axes."""
    return PartitionSpec(*(RULES[axis] or None if axis else None for axis in axes))


def sharding(mesh: jax.sharding.Mesh, *axes: str | None) -> NamedSharding:
    return NamedSharding(mesh, spec(*axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out over the mesh in force (`jax.set_mesh`) as its axes say; without a mesh x itself."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*axes))
