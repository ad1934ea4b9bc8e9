"""Grouped matrix multiplication: rows sorted by expert, each times its expert's matrix, and its gradients.

After Gale et al. 2022, "MegaBlocks", arXiv 2211.15841: nothing is dropped, and experts are not padded to the fullest.
Lowering for a platform selects the implementation: Pallas kernels (grouped_tpu.py), loops (grouped_cpu.py), or XLA's
ragged product on a GPU. On several devices call it inside `jax.shard_map` with check_vma=False: the TPU compiler does
not partition Pallas kernels.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.kernels import grouped_cpu, grouped_tpu


def grouped_matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], *, aligned: int = 1
) -> Float[Array, "N F"]:
    """Multiplies the first sizes[0] rows of x by weights[0], the next sizes[1] by weights[1], and so on.

    Args:
        x: rows sorted by expert.
        weights: the matrix of each expert.
        sizes: the rows of each expert. Rows after the last expert's give 0 and get no gradient, whatever they hold.
        aligned: divides N and, as the caller promises, every size; see `choose_alignment`.

    Returns:
        The products, accumulated in float32, in the dtype of x.

    Raises:
        ValueError: if `aligned` does not divide N.
    """
    if len(x) % aligned:
        raise ValueError(f"{len(x)} rows are not a multiple of aligned={aligned}")
    return _matmul(x, weights.astype(x.dtype), sizes.astype(jnp.int32), aligned)


def grouped_outer(
    x: Float[Array, "N D"], gradient: Float[Array, "N F"], sizes: Int[Array, " E"], *, aligned: int = 1
) -> Float[Array, "E D F"]:
    """Computes the gradient of `grouped_matmul` by the weights: x_eᵀ gradient_e for the rows of each expert e, in the
    dtype of x; 0 for an expert without rows. Not differentiable."""
    return jax.lax.platform_dependent(
        x,
        gradient,
        sizes,
        cpu=functools.partial(grouped_cpu.outer, aligned=aligned),
        tpu=grouped_tpu.outer,
        default=ragged_outer,
    )


def choose_alignment(platform: str, rows: int, experts: int) -> int:
    """Chooses the multiple to which each expert's rows are padded with zeros for speed.

    On a CPU that is at most an eighth of an even share, but at least 8. Padding then adds some 5 % where experts have
    64 rows or more. Elsewhere padding gains nothing.

    Args:
        platform: cpu, tpu or gpu.
        rows: N, before padding.
        experts: E.
    """
    return grouped_cpu.choose_alignment(rows, experts) if platform == "cpu" else 1


def reference_matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "N F"]:
    """Computes `grouped_matmul` by every expert on every row."""
    row, end = jnp.arange(len(x))[:, None], jnp.cumsum(sizes)
    y = jnp.zeros((len(x), weights.shape[2]), jnp.float32)
    for e in range(len(weights)):
        mask = (row >= end[e] - sizes[e]) & (row < end[e])
        y += jnp.where(mask, jnp.dot(jnp.where(mask, x, 0), weights[e], preferred_element_type=jnp.float32), 0)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul(x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], aligned: int):
    return _product(x, weights, sizes, aligned, transposed=False)


def _forward(x, weights, sizes, aligned):
    return _matmul(x, weights, sizes, aligned), (x, weights, sizes)


def _backward(aligned, saved, gradient):
    x, weights, sizes = saved
    dx = _product(gradient, weights, sizes, aligned, transposed=True)
    return dx, grouped_outer(x, gradient, sizes, aligned=aligned), None


_matmul.defvjp(_forward, _backward)


def _product(x, weights, sizes, aligned: int, transposed: bool):
    """Computes x_e W_e, or x_e W_eᵀ, for the rows of each expert e."""
    return jax.lax.platform_dependent(
        x,
        weights,
        sizes,
        cpu=functools.partial(grouped_cpu.matmul, aligned=aligned, transposed=transposed),
        tpu=functools.partial(grouped_tpu.matmul, transposed=transposed),
        default=functools.partial(ragged_matmul, transposed=transposed),
    )


def ragged_matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E ..."], sizes: Int[Array, " E"], transposed: bool
) -> Float[Array, "N F"]:
    """Computes `_product` by XLA's ragged product."""
    dimensions = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(x, weights, sizes, dimensions, preferred_element_type=jnp.float32)
    return _zero_unassigned(y, sizes).astype(x.dtype)


def ragged_outer(
    x: Float[Array, "N D"], gradient: Float[Array, "N F"], sizes: Int[Array, " E"]
) -> Float[Array, "E D F"]:
    """Computes `grouped_outer` by XLA's ragged product."""
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    x, gradient = _zero_unassigned(x, sizes), _zero_unassigned(gradient, sizes)
    y = jax.lax.ragged_dot_general(x, gradient, sizes, dimensions, preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def _zero_unassigned(x: Float[Array, "N D"], sizes: Int[Array, " E"]) -> Float[Array, "N D"]:
    """Sets the rows that belong to no expert to 0; jax leaves them undefined."""
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), x, 0)
