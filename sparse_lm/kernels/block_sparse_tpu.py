"""Pallas TPU kernels for block-sparse matrix multiplication: their grids visit exactly the blocks that exist.

The positions of the blocks are prefetched into scalar memory and select the parts of the operands that a step reads and
writes. Blocks that add to the same part of the result follow each other, so that it stays in VMEM until it is complete.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from sparse_lm.errors import UserError, nearest_divisor
from sparse_lm.layouts import Layout

LANES = 128  # the width of a vector register, whose multiples a last axis is cut at
TILE_BYTES = 2**21  # of the operand that stays in VMEM while a tile of tokens is multiplied by all blocks
TILE_TOKENS = 1024  # at most


def check_tpu_block(block: int, widths: tuple[int, int], field: str) -> None:
    """Raises `UserError` for a block size, set at a config's `field`, that a TPU can't tile."""
    if block % LANES:
        needed = "a multiple of {} that divides {} and {}".format(LANES, *widths)
        fit = nearest_divisor(block, *widths, multiple=LANES)
        suggestion = f"the nearest is {fit}" if fit else "there is none"
        raise UserError(f"{field} is {block}; a TPU needs {needed}; {suggestion}")


def gradients(
    x: Float[Array, "N D"],
    blocks: Float[Array, "n b b"],
    gradient: Float[Array, "N F"],
    layout: Layout,
    interpret: bool = False,
) -> tuple[Float[Array, "N D"], Float[Array, "n b b"]]:
    """Computes the gradients of `matmul` by x and by the blocks. interpret: run the kernels without a TPU."""
    dx = matmul(gradient, blocks, layout, transposed=True, interpret=interpret)
    return dx, block_gradients(x, gradient, layout, interpret=interpret)


def matmul(
    x: Float[Array, "N D"],
    blocks: Float[Array, "n b b"],
    layout: Layout,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "N F"]:
    """Computes x W, or x Wᵀ if transposed. The grid is tiles of tokens × blocks, sorted by column of the result."""
    b, (parts_in, parts_out) = layout.block, layout.shape
    source, target = np.array(layout.rows), np.array(layout.columns)
    if transposed:
        source, target, parts_in, parts_out = target, source, parts_out, parts_in
    number = np.lexsort((source, target))
    source, target = source[number], target[number]
    tokens, tile = len(x), _choose_tile(len(x), x.shape[1], x.dtype)
    y = pl.pallas_call(
        functools.partial(_matmul_kernel, b=b, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(tokens, tile), layout.num_blocks),
            in_specs=[
                pl.BlockSpec((tile, parts_in * b), lambda i, p, source, target, number: (i, 0)),
                pl.BlockSpec((1, b, b), lambda i, p, source, target, number: (number[p], 0, 0)),
            ],
            out_specs=pl.BlockSpec((tile, b), lambda i, p, source, target, number: (i, target[p])),
            scratch_shapes=[pltpu.VMEM((tile, b), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, parts_out * b), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="block_sparse_matmul",
    )(*(a.astype(np.int32) for a in (source, target, number)), x, blocks)
    visited = np.bincount(target, minlength=parts_out) > 0
    return y if visited.all() else jnp.where(np.repeat(visited, b), y, 0)


def _matmul_kernel(source, target, number, x, block, y, total, *, b: int, transposed: bool):
    p = pl.program_id(1)
    first, last = _first_and_last(target, p)

    @pl.when(first)
    def _():
        total[...] = jnp.zeros_like(total)

    slab = x[:, pl.ds(pl.multiple_of(source[p] * b, b), b)]
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    total[...] += jax.lax.dot_general(slab, block[0], contract, preferred_element_type=jnp.float32)

    @pl.when(last)
    def _():
        y[...] = total[...].astype(y.dtype)


def block_gradients(
    x: Float[Array, "N D"], gradient: Float[Array, "N F"], layout: Layout, interpret: bool = False
) -> Float[Array, "n b b"]:
    """Computes the gradient by each block: its slab of x, transposed, times its slab of the gradient."""
    b, tokens, tile = layout.block, len(x), _choose_tile(len(x), 2 * layout.block, x.dtype)
    rows, columns = np.array(layout.rows, np.int32), np.array(layout.columns, np.int32)
    return pl.pallas_call(
        functools.partial(_gradient_kernel, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(layout.num_blocks, pl.cdiv(tokens, tile)),
            in_specs=[
                pl.BlockSpec((tile, b), lambda p, i, rows, columns: (i, rows[p])),
                pl.BlockSpec((tile, b), lambda p, i, rows, columns: (i, columns[p])),
            ],
            out_specs=pl.BlockSpec((1, b, b), lambda p, i, rows, columns: (p, 0, 0)),
            scratch_shapes=[pltpu.VMEM((b, b), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((layout.num_blocks, b, b), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="block_sparse_gradient",
    )(rows, columns, x, gradient)


def _gradient_kernel(rows, columns, x, gradient, result, total, *, tokens: int):
    i, tiles = pl.program_id(1), pl.num_programs(1)

    @pl.when(i == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    left, right = x[...], gradient[...]
    if tokens % len(left):  # rows past the last token are undefined, maybe NaN
        valid = i * len(left) + jax.lax.broadcasted_iota(jnp.int32, left.shape, 0) < tokens
        left, right = jnp.where(valid, left, 0), jnp.where(valid, right, 0)
    contract = (((0,), (0,)), ((), ()))
    total[...] += jax.lax.dot_general(left, right, contract, preferred_element_type=jnp.float32)

    @pl.when(i == tiles - 1)
    def _():
        result[0] = total[...].astype(result.dtype)


def _first_and_last(group, p):
    """Whether step p is the first, and the last, step of its group."""
    end = pl.num_programs(1) - 1
    first = (p == 0) | (group[jnp.maximum(p - 1, 0)] != group[p])
    last = (p == end) | (group[jnp.minimum(p + 1, end)] != group[p])
    return first, last


def _choose_tile(tokens: int, width: int, dtype: jnp.dtype) -> int:
    """Chooses the tokens of a tile: as many as TILE_BYTES hold, in whole registers, or all."""
    fit = TILE_BYTES // (width * jnp.dtype(dtype).itemsize) // 16 * 16
    return min(tokens, TILE_TOKENS, max(16, fit))
