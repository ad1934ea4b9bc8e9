"""Grouped matrix multiplication on a TPU: jax's megablox kernels, with tiles that fit the shapes.

`jax.lax.ragged_dot` compiles to a grouped kernel too, which for some sizes does not fit the memory of the chip.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jaxtyping import Array, Float, Int


def matmul(
    x: Float[Array, "N D"],
    weights: Float[Array, "E ..."],
    sizes: Int[Array, " E"],
    transposed: bool,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Computes x_e W_e, or x_e W_eᵀ, for the rows of each expert e; 0 for rows of no expert."""
    rows, width = x.shape
    tiles = _choose_tiles(rows, len(sizes), width, weights.shape[1 if transposed else 2], x.dtype)
    y = gmm(_pad(x, tiles[0]), weights, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), y, 0)  # the kernel does not write these rows


def outer(
    x: Float[Array, "N D"], gradient: Float[Array, "N F"], sizes: Int[Array, " E"], interpret: bool = False
) -> Float[Array, "E D F"]:
    """Computes x_eᵀ gradient_e for the rows of each expert e."""
    tiles = _choose_tiles(len(x), len(sizes), x.shape[1], gradient.shape[1], x.dtype)
    return tgmm(_pad(x, tiles[0]).T, _pad(gradient, tiles[0]), sizes, x.dtype, tiles, interpret=interpret)


def _pad(x: Float[Array, "N D"], multiple: int) -> Float[Array, "M D"]:
    return jnp.pad(x, ((0, -len(x) % multiple), (0, 0)))


def _choose_tiles(
    rows: int, experts: int, width: int, columns: int, dtype: jax.typing.DTypeLike
) -> tuple[int, int, int]:
    """Chooses the tile sizes of rows, contracted width and columns.

    A tile of rows is computed once per expert that has rows in it, so it is at most an even share of the rows, but at
    least the 128 that fill the matrix unit. The other two sizes fit 16 MB of fast memory.
    """
    share = rows // experts
    tile = next((t for t in (512, 256) if t <= share), 128)
    return tile, _largest_divisor(width, 1024 if dtype == jnp.bfloat16 else 512), _largest_divisor(columns, 1024)


def _largest_divisor(size: int, limit: int) -> int:
    """Finds the largest multiple of 128 up to the limit that divides the size; a size up to the limit is returned."""
    if size <= limit:
        return size
    return next((t for t in range(limit, 0, -128) if size % t == 0), limit)
