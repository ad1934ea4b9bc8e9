"""The product of rows with one matrix, whose gradient by the matrix is laid out as a CPU likes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.mesh import platform


def linear(
    x: Float[Array, "*N D"], matrix: Float[Array, "D ..."], dtype: jax.typing.DTypeLike | None = None
) -> Float[Array, "..."]:
    """x times the matrix, over x's last axis and the matrix's first, in `dtype` (by default that of the operands).

    The gradient by the matrix contracts the rows, the first axis of both its operands, which a CPU does at half speed.
    There the narrower operand is turned first: 1.2 to 1.8 times as fast at a width of 128. Reverse mode alone on a CPU.
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
        by_matrix = matmul_transposed(rows, gradient)
    else:
        by_matrix = matmul_transposed(gradient, rows).T
    by_x = jnp.einsum("nf,df->nd", gradient, flat)
    return by_x.reshape(x.shape).astype(x.dtype), by_matrix.reshape(matrix.shape).astype(matrix.dtype)


_linear.defvjp(_forward, _backward)


def matmul_transposed(x: Float[Array, "*B N D"], y: Float[Array, "*B N F"]) -> Float[Array, "*B D F"]:
    """xᵀ y by turning x first. Of a transpose before or after a product the compiler would make a product again that
    contracts first axes."""
    turned = jax.lax.optimization_barrier(x.swapaxes(-1, -2))
    return jax.lax.optimization_barrier(turned @ y)
