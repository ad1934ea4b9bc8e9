"""Grouped matrix multiplication on a CPU: loops over experts, with products of two matrices inside.

A product with a batch axis is slow on a CPU, and `jax.lax.ragged_dot` costs as much as every expert on every row. Here
an expert's rows are cut into chunks of a few fixed lengths. Loops that run as often as there are chunks of a length
write their results in place; a `switch` would copy the whole result at each turn.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MAX_CHUNK = 512  # rows of a chunk, enough for a product to run at full speed
MAX_CASES = 16  # lengths of an expert's last chunk that `outer` has a program for


def choose_alignment(rows: int, experts: int) -> int:
    """The largest power of two that is at most an eighth of an even share, from 8 to 64."""
    return min(64, max(8, 1 << max(1, rows // (8 * experts)).bit_length() - 1))


def matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E ..."], sizes: Int[Array, " E"], aligned: int, transposed: bool
) -> Float[Array, "N F"]:
    """x W_e, or x W_eᵀ, for the rows of each expert e; 0 for the rows that are no expert's."""
    lengths = _chunk_lengths(len(x), len(sizes), aligned)
    starts = jnp.cumsum(sizes) - sizes

    def expert(e, y):
        matrix = jax.lax.dynamic_index_in_dim(weights, e, keepdims=False)
        start, left = starts[e], sizes[e]
        for length in reversed(lengths):

            def chunk(i, y, start=start, length=length):
                at = start + i * length
                part = _dot(jax.lax.dynamic_slice_in_dim(x, at, length), matrix, 1, int(transposed))
                return jax.lax.dynamic_update_slice_in_dim(y, part.astype(y.dtype), at, axis=0)

            chunks = left // length
            y = jax.lax.fori_loop(0, chunks, chunk, y)
            start, left = start + chunks * length, left - chunks * length
        return y

    y = jnp.zeros((len(x), weights.shape[1 if transposed else 2]), x.dtype)
    return jax.lax.fori_loop(0, len(sizes), expert, y)


def outer(
    x: Float[Array, "N D"], g: Float[Array, "N F"], sizes: Int[Array, " E"], aligned: int
) -> Float[Array, "E D F"]:
    """x_eᵀ g_e for each expert e.

    One of the two is turned first, since products with the contracted axis first run at half the speed or less: the
    narrower one, if that saves more than it costs to turn the result again.
    """
    if len(x) * (x.shape[1] - g.shape[1]) > len(sizes) * x.shape[1] * g.shape[1]:
        return outer(g, x, sizes, aligned).swapaxes(1, 2)
    longest = min(_chunk_lengths(len(x), len(sizes), aligned)[-1], MAX_CASES * aligned)
    starts = jnp.cumsum(sizes) - sizes
    columns = x.T

    def chunk(length: int):
        def product(at):
            if not length:
                return jnp.zeros((x.shape[1], g.shape[1]), jnp.float32)
            rows = jax.lax.dynamic_slice_in_dim(g, at, length)
            return _dot(jax.lax.dynamic_slice_in_dim(columns, at, length, axis=1), rows, 1, 0)

        return product

    last = [chunk(length) for length in range(0, longest, aligned)]

    def expert(e, products):
        start, whole = starts[e], sizes[e] // longest
        rest = sizes[e] - whole * longest
        product = jax.lax.switch(rest // aligned, last, start + whole * longest)
        add = lambda i, product: product + chunk(longest)(start + i * longest)
        product = jax.lax.fori_loop(0, whole, add, product)
        return jax.lax.dynamic_update_index_in_dim(products, product.astype(x.dtype), e, axis=0)

    return jax.lax.fori_loop(0, len(sizes), expert, jnp.zeros((len(sizes), x.shape[1], g.shape[1]), x.dtype))


def _chunk_lengths(rows: int, experts: int, aligned: int) -> list[int]:
    """Lengths of chunks, each twice the one before, up to that of an expert with more than an even share."""
    lengths = [aligned]
    while 2 * lengths[-1] <= min(MAX_CHUNK, rows, 2 * rows // experts):
        lengths.append(2 * lengths[-1])
    return lengths


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
