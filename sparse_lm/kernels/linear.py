"""The product of rows with one matrix, with a gradient that is fast on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.mesh import platform


def linear(
    x: Float[Array, "*N D"], matrix: Float[Array, "D ..."], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "..."]:
    """Multiplies x with a matrix, over the last axis of x and the first of the matrix.

    The gradient by the matrix contracts the first axes of its operands, which takes a CPU twice as long. There the
    narrower operand is transposed first: 1.2 to 1.8 times as fast at a width of 128. Reverse mode only on a CPU.

    Args:
        x: rows.
        matrix: of any number of output axes.
        dtype: of the result; None: that of the operands.
    """
    return (_linear if platform() == "cpu" else _product)(x, matrix, dtype)


def _product(x, matrix, dtype):
    return jnp.tensordot(x, matrix, 1, preferred_element_type=dtype)


_linear = jax.custom_vjp(_product, nondiff_argnums=(2,))


def _forward(x, matrix, dtype):
    return _product(x, matrix, dtype), (x, matrix)


def _backward(dtype, saved, gradient):
    x, matrix = saved
    rows, flat = x.reshape(-1, len(matrix)), matrix.reshape(len(matrix), -1)
    gradient = gradient.reshape(len(rows), -1)
    if rows.shape[1] <= gradient.shape[1]:
        d_matrix = matmul_transposed(rows, gradient)
    else:
        d_matrix = matmul_transposed(gradient, rows).T
    dx = jnp.einsum("nf,df->nd", gradient, flat)
    return dx.reshape(x.shape).astype(x.dtype), d_matrix.reshape(matrix.shape).astype(matrix.dtype)


_linear.defvjp(_forward, _backward)


def matmul_transposed(x: Float[Array, "*B N D"], y: Float[Array, "*B N F"]) -> Float[Array, "*B D F"]:
    """Computes xᵀ y from a transposed copy of x. Without the barriers the compiler would merge the transpose into the
    product, which then contracts first axes."""
    transposed = jax.lax.optimization_barrier(x.swapaxes(-1, -2))
    return jax.lax.optimization_barrier(transposed @ y)
