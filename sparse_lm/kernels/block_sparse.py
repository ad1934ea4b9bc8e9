"""Block-sparse matrix multiplication: y = x W where only some b × b blocks of W exist, and its gradients.

After Gray, Radford and Kingma 2017, "GPU kernels for block-sparse weights". Time and memory grow with n, the number of
blocks that exist. A TPU runs the Pallas kernels in block_sparse_tpu.py, other platforms products of gathered blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_lm import mesh
from sparse_lm.kernels import block_sparse_tpu
from sparse_lm.layouts import Layout

MAX_LOOPS = 4  # in one product; each is compiled separately


def block_sparse_matmul(
    x: Float[Array, "*batch D"], blocks: Float[Array, "n b b"], layout: Layout
) -> Float[Array, "*batch F"]:
    """Computes x W in the dtype of x, accumulated in float32.

    With an active mesh (`jax.set_mesh`) the first axis of x is divided as a batch is.

    Args:
        x: inputs, D = layout.width_in.
        blocks: of W in the order of the layout, each [in, out].
        layout: of W; F = layout.width_out.

    Raises:
        ValueError: if the shapes do not match the layout.
    """
    expected = (layout.width_in, (layout.num_blocks, layout.block, layout.block))
    if (x.shape[-1], blocks.shape) != expected:
        raise ValueError(f"x of width {x.shape[-1]} and blocks {blocks.shape}; the layout has {expected}")
    return _product(x, blocks.astype(x.dtype), layout)


def reference_matmul(
    x: Float[Array, "*batch D"], blocks: Float[Array, "n b b"], layout: Layout
) -> Float[Array, "*batch F"]:
    """Computes `block_sparse_matmul` by the dense matrix, which is 0 where no block exists."""
    rows, columns = layout.shape
    dense = jnp.zeros((rows, columns, layout.block, layout.block), x.dtype)
    dense = dense.at[np.array(layout.rows), np.array(layout.columns)].set(blocks.astype(x.dtype))
    dense = dense.swapaxes(1, 2).reshape(layout.width_in, layout.width_out)
    return jnp.dot(x, dense, preferred_element_type=jnp.float32).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Float[Array, "*batch D"], blocks: Float[Array, "n b b"], layout: Layout) -> Float[Array, "*batch F"]:
    def product(x, blocks):
        y = jax.lax.platform_dependent(
            x.reshape(-1, layout.width_in),
            blocks,
            tpu=functools.partial(block_sparse_tpu.matmul, layout=layout),
            default=functools.partial(gathered_matmul, layout=layout),
        )
        return y.reshape(*x.shape[:-1], layout.width_out)

    if _row_axes(x):
        rows = mesh.partition_spec("batch")
        product = jax.shard_map(product, in_specs=(rows, mesh.partition_spec()), out_specs=rows, check_vma=False)
    return product(x, blocks)


def _forward(x, blocks, layout):
    return _product(x, blocks, layout), (x, blocks)


def _backward(layout, saved, gradient):
    x, blocks = saved
    axes = _row_axes(x)

    def gradients(x, blocks, gradient):
        dx, d_blocks = jax.lax.platform_dependent(
            x.reshape(-1, layout.width_in),
            blocks,
            gradient.reshape(-1, layout.width_out),
            tpu=functools.partial(block_sparse_tpu.gradients, layout=layout),
            default=functools.partial(gathered_gradients, layout=layout),
        )
        return dx.reshape(x.shape), jax.lax.psum(d_blocks, axes)

    if axes:
        rows, replicated = mesh.partition_spec("batch"), mesh.partition_spec()
        gradients = jax.shard_map(
            gradients, in_specs=(rows, replicated, rows), out_specs=(rows, replicated), check_vma=False
        )
    return gradients(x, blocks, gradient)


_product.defvjp(_forward, _backward)


def _row_axes(x: jax.Array) -> tuple[str, ...]:
    """Returns the axes of the active mesh that divide the first axis of x."""
    return () if x.ndim == 1 or jax.sharding.get_abstract_mesh().empty else mesh.RULES["batch"]


def gathered_matmul(x: Float[Array, "N D"], blocks: Float[Array, "n b b"], layout: Layout) -> Float[Array, "N F"]:
    """Computes x W: for each column of blocks the product of the slabs of x that it uses with its blocks.

    In a loop, because products of two matrices are faster than products with a batch axis, and the program does not
    grow with the number of blocks.
    """
    b = layout.block
    y = jnp.zeros((len(x), layout.width_out), x.dtype)
    for index, other, number in _group_by_count(layout.columns, layout.rows, layout.shape[1]):
        stacked = _gather_blocks(blocks, number).reshape(len(index), -1, b)

        def multiply_column(y, line):
            index, other, stacked = line
            return _write_slab(y, _dot(_gather_slabs(x, other, b), stacked, 1, 0), index, b), None

        y, _ = jax.lax.scan(multiply_column, y, (index, other, stacked))
    return y


def gathered_gradients(
    x: Float[Array, "N D"], blocks: Float[Array, "n b b"], gradient: Float[Array, "N F"], layout: Layout
) -> tuple[Float[Array, "N D"], Float[Array, "n b b"]]:
    """Computes the gradients by x and by the blocks, row by row of blocks.

    The slabs of the gradient that a row uses, times its blocks, are the gradient of a slab of x; times that slab of x
    they are the gradients of the blocks.
    """
    b = layout.block
    dx = jnp.zeros_like(x)
    stacks, numbers = [], []
    for index, other, number in _group_by_count(layout.rows, layout.columns, layout.shape[0]):
        m, count = number.shape
        stacked = _gather_blocks(blocks, number).swapaxes(1, 2).reshape(m, b, count * b)

        def multiply_row(dx, line):
            index, other, stacked = line
            slabs = _gather_slabs(gradient, other, b)
            dx = _write_slab(dx, _dot(slabs, stacked, 1, 1), index, b)
            return dx, _dot(_gather_slabs(x, index[None], b), slabs, 0, 0)

        dx, stacked = jax.lax.scan(multiply_row, dx, (index, other, stacked))
        stacks.append(stacked.reshape(m, b, count, b).swapaxes(1, 2).reshape(m * count, b, b))
        numbers.append(number.reshape(-1))
    # The position of each block's gradient; padding, numbered n, sorts last and is cut off.
    order = np.argsort(np.concatenate(numbers), kind="stable")[: layout.num_blocks]
    return dx, jnp.concatenate(stacks)[order]


class _Lines(NamedTuple):
    """m lines (rows or columns of blocks), each padded to `count` blocks."""

    index: Int[np.ndarray, " m"]  # of each line
    other: Int[np.ndarray, "m count"]  # the column or row of each block
    number: Int[np.ndarray, "m count"]  # of each block in the layout; n for padding, a block of zeros


def _group_by_count(lines: tuple[int, ...], others: tuple[int, ...], number: int) -> list[_Lines]:
    """Groups the lines that have blocks by their number of blocks. Where that makes more than MAX_LOOPS groups, lines
    are padded to MAX_LOOPS numbers of blocks, chosen greedily for the least padding."""
    lines, others = np.array(lines), np.array(others)
    order, counts = np.lexsort((others, lines)), np.bincount(lines, minlength=number)
    start = np.cumsum(counts) - counts
    sizes = np.unique(counts[counts > 0])
    while len(sizes) > MAX_LOOPS:
        # Without a size, its lines are padded to the next.
        lines_of_size = np.histogram(counts, [1, *(sizes + 1)])[0][:-1]
        sizes = np.delete(sizes, np.argmin(lines_of_size * np.diff(sizes)))
    groups = []
    for below, size in zip([0, *sizes], sizes):
        index = np.flatnonzero((counts > below) & (counts <= size))
        position = start[index, None] + np.arange(size)
        block = np.append(order, len(order))[np.where(np.arange(size) < counts[index, None], position, len(order))]
        groups.append(_Lines(index, np.append(others, 0)[block], block))
    return groups


def _gather_blocks(blocks: Float[Array, "n b b"], number: Int[np.ndarray, "m count"]) -> Float[Array, "m count b b"]:
    return blocks.at[number].get(mode="fill", fill_value=0)


def _gather_slabs(x: Float[Array, "N D"], index: Int[Array, " count"], width: int) -> Float[Array, "N slabs"]:
    slabs = [jax.lax.dynamic_slice_in_dim(x, index[i] * width, width, axis=1) for i in range(len(index))]
    return jnp.concatenate(slabs, axis=1)


def _write_slab(
    y: Float[Array, "N F"], slab: Float[Array, "N b"], index: Int[Array, ""], width: int
) -> Float[Array, "N F"]:
    return jax.lax.dynamic_update_slice_in_dim(y, slab, index * width, axis=1)


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contracts one axis of each, accumulated in float32, in the dtype of a."""
    product = jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
    return product.astype(a.dtype)
