"""Grouped matrix multiplication on a TPU: jax's megablox kernels, with tiles that fit the shapes.

`jax.lax.ragged_dot` compiles to a grouped kernel too, but for some sizes to one that does not fit the chip's memory.
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
    """x W_e, or x W_eᵀ, for the rows of each expert e; 0 for the rows that are no expert's."""
    rows, width = x.shape
    tiles = _choose_tiles(rows, len(sizes), width, weights.shape[1 if transposed else 2], x.dtype)
    y = gmm(_pad(x, tiles[0]), weights, sizes, x.dtype, tiles, transpose_rhs=transposed, interpret=interpret)[:rows]
    return jnp.where(jnp.arange(rows)[:, None] < sizes.sum(), y, 0)  # the kernel leaves these rows as they were


def outer(
    x: Float[Array, "N D"], g: Float[Array, "N F"], sizes: Int[Array, " E"], interpret: bool = False
) -> Float[Array, "E D F"]:
    """x_eᵀ g_e for each expert e."""
    tiles = _choose_tiles(len(x), len(sizes), x.shape[1], g.shape[1], x.dtype)
    return tgmm(_pad(x, tiles[0]).T, _pad(g, tiles[0]), sizes, x.dtype, tiles, interpret=interpret)


def _pad(x: Float[Array, "N D"], multiple: int) -> Float[Array, "M D"]:
    return jnp.pad(x, ((0, -len(x) % multiple), (0, 0)))


def _choose_tiles(
    rows: int, experts: int, width: int, columns: int, dtype: jax.typing.DTypeLike
) -> tuple[int, int, int]:
    """Sizes of tiles of rows, contracted width and columns.

    A tile of rows is computed once for each expert that has some of it, so it is no longer than an even share of the
    rows, but at least the 128 that fill the matrix unit. The other two take what fits in 16 MB of fast memory.
    """
    share = rows // experts
    tile = next((t for t in (512, 256) if t <= share), 128)
    return tile, _largest_divisor(width, 1024 if dtype == jnp.bfloat16 else 512), _largest_divisor(columns, 1024)


def _largest_divisor(size: int, limit: int) -> int:
    """The largest multiple of 128 up to the limit that divides the size, or all of a small one."""
    if size <= limit:
        return size
    return next((t for t in range(limit, 0, -128) if size % t == 0), limit)
