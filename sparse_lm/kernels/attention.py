"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with a custom gradient on a CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.kernels.linear import matmul_transposed
from sparse_lm.mesh import platform


def attend(
    query: Float[Array, "B L H h"],
    key: Float[Array, "B T N h"],
    value: Float[Array, "B T N h"],
    mask: Bool[Array, "B L T"],
) -> Float[Array, "B L H h"]:
    """Computes softmax(query keyᵀ / √h) value, with the softmax in float32.

    On a CPU the gradient contracts no first axes, and takes two thirds of the time of the derivative of
    `jax.nn.dot_product_attention` (width 128, 4 heads, length 128). It supports reverse mode only.

    Args:
        query: H heads of width h.
        key: of T positions; head i of the query uses head i · N / H.
        value: as the key.
        mask: which positions each query attends to; a query with none gets the mean of all values.
    """
    if platform() != "cpu":
        return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], implementation="xla")
    batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    repeats = heads // kv_heads
    rows = query.reshape(batch, length, kv_heads, repeats, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, repeats * length, width)
    y = _attend(rows, key.swapaxes(1, 2), value.swapaxes(1, 2), jnp.tile(mask, (1, repeats, 1))[:, None])
    y = y.reshape(batch, kv_heads, repeats, length, width).transpose(0, 3, 1, 2, 4)
    return y.reshape(query.shape)


@jax.custom_vjp
def _attend(
    query: Float[Array, "B N R h"],
    key: Float[Array, "B N T h"],
    value: Float[Array, "B N T h"],
    mask: Bool[Array, "B 1 R T"],
) -> Float[Array, "B N R h"]:
    return _forward(query, key, value, mask)[0]


def _forward(query, key, value, mask):
    scores = jnp.einsum("bnqh,bnkh->bnqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min / 2)
    p = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    p *= 1 / p.sum(axis=-1, keepdims=True)
    y = jnp.einsum("bnqk,bnkh->bnqh", p.astype(value.dtype), value)
    return y, (query, key, value, mask, p, y)


def _backward(saved, gradient):
    query, key, value, mask, p, y = saved
    dtype = value.dtype
    d_value = matmul_transposed(gradient, p.astype(dtype)).swapaxes(-1, -2)
    d_p = jnp.einsum("bnqh,bnkh->bnqk", gradient, value, preferred_element_type=jnp.float32)
    mean = (gradient.astype(jnp.float32) * y).sum(axis=-1, keepdims=True)
    d_scores = jnp.where(mask, p * (d_p - mean) * query.shape[-1] ** -0.5, 0).astype(dtype)
    return d_scores @ key, matmul_transposed(query, d_scores).swapaxes(-1, -2), d_value, None


_attend.defvjp(_forward, _backward)
