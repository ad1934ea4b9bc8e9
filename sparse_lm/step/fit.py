"""Whether a config fits a mesh."""

import math

import jax
from jax.sharding import AbstractMesh, Mesh

from sparse_lm.config import Config
from sparse_lm.errors import DoesNotFit, UserError
from sparse_lm.kernels.block_sparse_tpu import check_tpu_block
from sparse_lm.mesh import RULES
from sparse_lm.models import Functional
from sparse_lm.parameter import key_names
from sparse_lm.routing import router_of

# The fields that the size of an axis may come from; the one that has the size is named in an error.
FIELDS = {
    "width": ("model.width",),
    "heads": ("model.kv_heads", "model.heads"),
    "vocabulary": ("model.vocabulary",),
    "hidden": ("model.ffn_width", "model.expert_width"),
    "experts": ("model.experts",),
    "block_in": ("model.layout.options.block",),
}


def check_fit(config: Config, mesh: Mesh | AbstractMesh, functional: Functional, platform: str = "cpu") -> None:
    """Raises `DoesNotFit` for a size that an axis of the mesh does not divide, and `UserError` for blocks that the
    platform can't tile and for groups that are no rows where whole layers are skipped."""
    model, rows = config.model, config.training.batch // config.training.accumulation
    if model.experts and router_of(model).skips_layers and model.group_size != config.data.length:
        raise UserError(
            f"model.group_size is {model.group_size}; the router {model.router.name!r} chooses among the "
            f"{config.data.length} tokens of a row, so it must be 0"
        )
    sizes = [("batch", "training.batch / training.accumulation", rows)]
    sizes += _parameter_sizes(config, functional)
    if model.experts:
        what = "the number of routing groups in a step (rows × data.length / model.group_size)"
        sizes.append(("groups", what, rows * config.data.length // model.group_size))
    for axis, name, size in sizes:
        parts = math.prod(mesh.shape[m] for m in RULES[axis])
        if size % parts:
            near = max(parts, round(size / parts) * parts)
            across = " × ".join(f"mesh.{m}={mesh.shape[m]}" for m in RULES[axis])
            raise DoesNotFit(f"{name} is {size}, which {across} does not divide; the nearest that would do is {near}")
    for block in {size for axis, _, size in sizes if axis == "block_in" and platform == "tpu"}:
        check_tpu_block(block, (model.width, model.expert_width), "model.layout.options.block")


def _parameter_sizes(config: Config, functional: Functional) -> list[tuple[str, str, int]]:
    """(axis, what a user calls it, size) of every axis of a parameter that the mesh may divide."""
    found = {}
    axes_of = jax.tree.leaves_with_path(functional.axes, is_leaf=lambda a: isinstance(a, tuple))
    for (path, axes), leaf in zip(axes_of, jax.tree.leaves(functional.shapes), strict=True):
        for axis, size in zip(axes, leaf.shape, strict=True):
            if RULES[axis]:
                name = _field(config, axis, size) or f"the {axis} of {'/'.join(map(str, key_names(path)))}"
                found.setdefault((axis, size), name)
    return [(axis, name, size) for (axis, size), name in found.items()]


def _field(config: Config, axis: str, size: int) -> str | None:
    """The config's field that gives an axis its size, None where no field has this value."""
    fields = FIELDS.get(axis, ())
    if len(fields) == 1:
        return fields[0]
    return next((field for field in fields if getattr(config.model, field.removeprefix("model.")) == size), None)
