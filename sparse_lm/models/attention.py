"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions (Su et al. 2021, 2104.09864)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.kernels.attention import attend
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.parameter import matrix, weight


class Cache(NamedTuple):
    """Keys and values of T positions."""

    key: Float[Array, "B T N h"]
    value: Float[Array, "B T N h"]


class Attention(nnx.Module):
    """H heads of width h, N = kv_heads of them with keys and values of their own."""

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        d, h, n, w = model.width, model.heads, model.kv_heads, model.head_width
        axes, scale = ("width", "heads", "head_width"), model.init_scale
        self.query = matrix(rngs, (d, h, w), axes, fan_in=d, scale=scale)
        self.key = matrix(rngs, (d, n, w), axes, fan_in=d, scale=scale)
        self.value = matrix(rngs, (d, n, w), axes, fan_in=d, scale=scale)
        self.out = matrix(rngs, (h, w, d), ("heads", "head_width", "width"), fan_in=h * w, scale=scale)
        self.rope_base = model.rope_base

    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        mask: Bool[Array, "B L T"],
        cache: tuple[Cache, Int[Array, ""]] | None = None,
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """Attends where the mask is True. With a cache and the place to write at, keys and values are written there
        first, the mask covers the cache's T positions, and the new cache is returned; without one, T is L."""
        project = lambda parameter: linear(x, weight(parameter, x.dtype))
        query = rotate(project(self.query), positions, self.rope_base)
        key = rotate(project(self.key), positions, self.rope_base)
        value = project(self.value)
        if cache is not None:
            stored, start = cache
            key, value = stored = Cache(
                jax.lax.dynamic_update_slice_in_dim(stored.key, key, start, axis=1),
                jax.lax.dynamic_update_slice_in_dim(stored.value, value, start, axis=1),
            )
        query, key, value = (constrain(t, "batch", None, "heads", None) for t in (query, key, value))
        y = attend(query, key, value, mask)
        y = linear(y.reshape(*x.shape[:2], -1), weight(self.out, x.dtype).reshape(-1, x.shape[-1]))
        return constrain(y, "batch", None, None), None if cache is None else stored


def rotate(x: Float[Array, "B L H h"], positions: Int[Array, "B L"], base: float) -> Float[Array, "B L H h"]:
    """Rotary positions: feature i and i + h/2 are turned by the angle position / base^(2 i / h), in float32."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions[..., None] * frequency)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle))
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
