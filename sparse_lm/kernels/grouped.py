"""Grouped matrix multiplication: rows sorted by expert, each times its expert's matrix, and its gradients.

After Gale et al. 2022, "MegaBlocks", arXiv 2211.15841: nothing is dropped and no expert is padded to the fullest one.
Which way is taken is decided when a program is lowered for a platform: the Pallas kernels in grouped_tpu.py, the loops
in grouped_cpu.py, or XLA's own ragged product on a GPU. On several devices call it inside `jax.shard_map` with
check_vma=False: the TPU compiler does not divide Pallas kernels by itself.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.kernels import grouped_cpu, grouped_tpu


def grouped_matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"], *, aligned: int = 1
) -> Float[Array, "N F"]:
    """The first sizes[0] rows of x times weights[0], the next sizes[1] times weights[1], and so on, in x's dtype.

    Rows after the last expert's give 0 and get no gradient, whatever they hold. Products accumulate in float32.

    aligned: a promise that N and every size are multiples of it; see `alignment`.
    Raises `ValueError` when N is not.
    """
    if len(x) % aligned:
        raise ValueError(f"{len(x)} rows are not a multiple of aligned={aligned}")
    return _matmul(x, weights.astype(x.dtype), sizes.astype(jnp.int32), aligned)


def grouped_outer(
    x: Float[Array, "N D"], g: Float[Array, "N F"], sizes: Int[Array, " E"], *, aligned: int = 1
) -> Float[Array, "E D F"]:
    """For each expert the product of its rows, x_eᵀ g_e, in x's dtype, and 0 for an expert without rows.

    It is the gradient of `grouped_matmul` by the weights. It has no gradient of its own.
    """
    return jax.lax.platform_dependent(
        x,
        g,
        sizes,
        cpu=functools.partial(grouped_cpu.outer, aligned=aligned),
        tpu=grouped_tpu.outer,
        default=ragged_outer,
    )


def choose_alignment(platform: str, rows: int, experts: int) -> int:
    """The multiple to which each expert's rows are best padded with zeros on a platform ("cpu", "tpu", "gpu").

    On a CPU an eighth of an even share or less, but at least 8; padding then adds some 5 % where experts have 64 rows
    or more, and never more than experts · (alignment - 1) rows. Elsewhere 1: nothing is gained by padding.
    """
    return grouped_cpu.choose_alignment(rows, experts) if platform == "cpu" else 1


def reference_matmul(
    x: Float[Array, "N D"], weights: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "N F"]:
    """The same, by every expert on every row."""
    of_expert = _expert_masks(len(x), sizes)
    y = jnp.zeros((len(x), weights.shape[2]), jnp.float32)
    for e, rows in enumerate(of_expert):
        rows = rows[:, None]
        y += jnp.where(rows, jnp.dot(jnp.where(rows, x, 0), weights[e], preferred_element_type=jnp.float32), 0)
    return y.astype(x.dtype)


def _expert_masks(rows: int, sizes: Int[Array, " E"]) -> jax.Array:
    """[E, N]: whether the row is the expert's."""
    end = jnp.cumsum(sizes)[:, None]
    return (jnp.arange(rows) >= end - sizes[:, None]) & (jnp.arange(rows) < end)


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
    """x W_e, or x W_eᵀ."""
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
    dimensions = jax.lax.RaggedDotDimensionNumbers((((1,), (2 if transposed else 1,)), ((), ())), [0], [0])
    y = jax.lax.ragged_dot_general(x, weights, sizes, dimensions, preferred_element_type=jnp.float32)
    return _zero_unassigned(y, sizes).astype(x.dtype)


def ragged_outer(x: Float[Array, "N D"], g: Float[Array, "N F"], sizes: Int[Array, " E"]) -> Float[Array, "E D F"]:
    dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    x, g = _zero_unassigned(x, sizes), _zero_unassigned(g, sizes)
    return jax.lax.ragged_dot_general(x, g, sizes, dimensions, preferred_element_type=jnp.float32).astype(x.dtype)


def _zero_unassigned(x: Float[Array, "N D"], sizes: Int[Array, " E"]) -> Float[Array, "N D"]:
    """x, with 0 in the rows that are no expert's, of which jax promises nothing."""
    return jnp.where(jnp.arange(len(x))[:, None] < sizes.sum(), x, 0)
