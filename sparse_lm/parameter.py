"""Parameters with the names of their axes, which travel with them to the mesh, the optimizer and checkpoints."""

import jax
import jax.numpy as jnp
from flax import nnx

# Standard deviation of a normal distribution cut off at two of its own.
_TRUNCATED = 0.87962566103423978


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, fan_in: int, scale: float) -> nnx.Param:
    """Truncated normal with standard deviation sqrt(scale / fan_in) (Fedus et al. 2021, section 2.4, with scale s)."""
    deviation = (scale / fan_in) ** 0.5
    values = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape) * (deviation / _TRUNCATED)
    return nnx.Param(values, axes=axes)


def ones(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    return nnx.Param(jnp.ones(shape), axes=axes)
