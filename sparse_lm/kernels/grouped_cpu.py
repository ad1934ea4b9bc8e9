"""Grouped matrix multiplication on a CPU: loops over experts, with products of two matrices inside.

A product with a batch axis is slow on a CPU, and `jax.lax.ragged_dot` costs as much as every expert on every row. Here
the rows of an expert are cut into chunks of a few fixed lengths, with one loop over the chunks of each length. Loops
write their results in place; a `switch` would copy the whole result in each iteration.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_CHUNK = 512  # rows, enough for a product to run at full speed
MAX_CASES = 16  # lengths of an expert's last chunk that `outer` compiles


def choose_alignment(rows: int, experts: int) -> int:
    """Chooses the largest power of two up to an eighth of an even share, from 8 to 64."""
    return min(64, max(8, 1 << max(1, rows // (8 * experts)).bit_length() - 1))


def matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E ..."], sizes: Int[Array, " E"], aligned: int, transposed: bool
) -> Float[Array, "N F"]:
    """Computes x_e W_e, or x_e W_eᵀ, for the rows of each expert e; 0 for rows of no expert."""
    lengths = _chunk_lengths(len(x), len(sizes), aligned)
    starts = jnp.cumsum(sizes) - sizes

    def multiply_expert(e, y):
        matrix = jax.lax.dynamic_index_in_dim(weights, e, keepdims=False)
        start, remaining = starts[e], sizes[e]
        for length in reversed(lengths):

            def multiply_chunk(i, y, start=start, length=length):
                first = start + i * length
                chunk = _dot(jax.lax.dynamic_slice_in_dim(x, first, length), matrix, 1, int(transposed))
                return jax.lax.dynamic_update_slice_in_dim(y, chunk.astype(y.dtype), first, axis=0)

            chunks = remaining // length
            y = jax.lax.fori_loop(0, chunks, multiply_chunk, y)
            start, remaining = start + chunks * length, remaining - chunks * length
        return y

    y = jnp.zeros((len(x), weights.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.fori_loop(0, len(sizes), multiply_expert, y)


def outer(
    x: Float[Array, "N D"], gradient: Float[Array, "N F"], sizes: Int[Array, " E"], aligned: int
) -> Float[Array, "E D F"]:
    """Computes x_eᵀ gradient_e for the rows of each expert e.

    One operand is transposed first, since products that contract first axes run at half the speed or less: the narrower
    one, if that saves more than transposing the result back costs.
    """
    if len(x) * (x.shape[1] - gradient.shape[1]) > len(sizes) * x.shape[1] * gradient.shape[1]:
        return outer(gradient, x, sizes, aligned).swapaxes(1, 2)
    longest = min(_chunk_lengths(len(x), len(sizes), aligned)[-1], MAX_CASES * aligned)
    starts = jnp.cumsum(sizes) - sizes
    columns = x.T

    def multiply_chunk(length: int, first):
        if not length:
            return jnp.zeros((x.shape[1], gradient.shape[1]), jnp.float32)
        rows = jax.lax.dynamic_slice_in_dim(gradient, first, length)
        return _dot(jax.lax.dynamic_slice_in_dim(columns, first, length, axis=1), rows, 1, 0)

    last_chunk = [functools.partial(multiply_chunk, length) for length in range(0, longest, aligned)]

    def multiply_expert(e, products):
        start, chunks = starts[e], sizes[e] // longest
        remaining = sizes[e] - chunks * longest
        product = jax.lax.switch(remaining // aligned, last_chunk, start + chunks * longest)
        add = lambda i, product: product + multiply_chunk(longest, start + i * longest)
        product = jax.lax.fori_loop(0, chunks, add, product)
        return jax.lax.dynamic_update_index_in_dim(products, product.astype(x.dtype), e, axis=0)

    products = jnp.zeros((len(sizes), x.shape[1], gradient.shape[1]), x.dtype)
    return jax.lax.fori_loop(0, len(sizes), multiply_expert, products)


def _chunk_lengths(rows: int, experts: int, aligned: int) -> list[int]:
    """Lists chunk lengths, each twice the one before, up to twice an even share of the rows."""
    lengths = [aligned]
    while 2 * lengths[-1] <= min(MAX_CHUNK, rows, 2 * rows // experts):
        lengths.append(2 * lengths[-1])
    return lengths


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
