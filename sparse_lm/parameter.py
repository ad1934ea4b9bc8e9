"""Parameters with named axes, which the mesh, the optimizer and checkpoints use."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.mesh import RULES, constrain

Axes = tuple[str | None, ...]  # names of `mesh.RULES`; None: an axis that no mesh divides

# Standard deviation of a standard normal distribution truncated at ±2.
_TRUNCATED = 0.87962566103423978


def init_matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, fan_in: int | float, scale: float) -> nnx.Param:
    """Draws from a truncated normal with standard deviation sqrt(scale / fan_in) (Fedus et al. 2021, section 2.4)."""
    deviation = (scale / fan_in) ** 0.5
    values = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * (deviation / _TRUNCATED)
    return nnx.Param(values, axes=axes)


def init_ones(shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)


def gather_weight(parameter: nnx.Param, dtype: str | jnp.dtype) -> jax.Array:
    """Casts a parameter to the dtype of the computation and gathers it along the axes that only fsdp divides.

    Without this the partitioner may divide activations by width instead, which are then expensive to lay out again.
    """
    return constrain(parameter[...].astype(dtype), *gathered_axes(parameter))


def gathered_axes(parameter: nnx.Param) -> Axes:
    """Returns the axes of `gather_weight`'s result in one layer; None for a gathered one."""
    axes = [axis for axis in parameter.get_metadata("axes") if axis != "layers"]
    return tuple(None if RULES[axis] == ("fsdp",) else axis for axis in axes)


def is_hidden_matrix(axes: Axes) -> bool:
    """Whether an array with these axes is a hidden matrix, for which Muon is made: one of attention, a feed-forward
    layer or experts, not an embedding, a router, a norm or blocks."""
    return "width" in axes and "router_experts" not in axes


def key_names(path: tuple) -> tuple:
    """Returns the keys of a path in a tree of dicts, named tuples and sequences."""
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
