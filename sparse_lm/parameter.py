"""Parameters with the names of their axes, which travel with them to the mesh, the optimizer and checkpoints."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.mesh import RULES, constrain

Axes = tuple[str | None, ...]  # names of `mesh.RULES`; None: an axis that no mesh divides

# Standard deviation of a normal distribution cut off at two of its own.
_TRUNCATED = 0.87962566103423978


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, fan_in: int | float, scale: float) -> nnx.Param:
    """Truncated normal with standard deviation sqrt(scale / fan_in) (Fedus et al. 2021, section 2.4, with scale s)."""
    deviation = (scale / fan_in) ** 0.5
    values = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * (deviation / _TRUNCATED)
    return nnx.Param(values, axes=axes)


def ones(shape: tuple[int, ...], axes: Axes) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)


def weight(parameter: nnx.Param, dtype: str | jnp.dtype) -> jax.Array:
    """The parameter in the dtype of the computation, whole along the axes that fsdp alone divides, to store it only.

    Without this the partitioner may divide activations by width instead, which it then can't lay out again cheaply.
    """
    return constrain(parameter[...].astype(dtype), *weight_axes(parameter))


def weight_axes(parameter: nnx.Param) -> Axes:
    """The axes of `weight` in one layer."""
    axes = [axis for axis in parameter.get_metadata("axes") if axis != "layers"]
    return tuple(None if RULES[axis] == ("fsdp",) else axis for axis in axes)


def is_hidden_matrix(axes: Axes) -> bool:
    """Whether an array with these axes is a matrix between features, which Muon is for: of attention, a feed-forward
    layer or experts, and not an embedding, a router, a norm or blocks."""
    return "width" in axes and "router_experts" not in axes


def key_names(path: tuple) -> tuple:
    """The keys of a path in a tree: of dicts, named tuples and sequences alike."""
    return tuple(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path)
