"""Parameters with the names of their axes, which travel with them to the mesh, the optimizer and checkpoints."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.mesh import RULES, constrain

# Standard deviation of a normal distribution cut off at two of its own.
_TRUNCATED = 0.87962566103423978


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int | float, scale: float
) -> nnx.Param:
    """Truncated normal with standard deviation sqrt(scale / fan_in) (Fedus et al. 2021, section 2.4, with scale s)."""
    deviation = (scale / fan_in) ** 0.5
    values = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * (deviation / _TRUNCATED)
    return nnx.Param(values, axes=axes)


def ones(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)


def weight(parameter: nnx.Param, dtype: str | jnp.dtype) -> jax.Array:
    """The parameter in the dtype of the computation, whole along the axes that fsdp alone divides, to store it only.

    Without this the partitioner may divide activations by width instead, which it then can't lay out again cheaply.
    """
    return constrain(parameter[...].astype(dtype), *weight_axes(parameter))


def weight_axes(parameter: nnx.Param) -> tuple[str | None, ...]:
    """The axes of `weight` in one layer."""
    axes = [axis for axis in parameter.get_metadata("axes") if axis != "layers"]
    return tuple(None if RULES[axis] == ("fsdp",) else axis for axis in axes)
