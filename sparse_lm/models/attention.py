"""Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions (Su et al. 2021, 2104.09864)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.kernels.attention import attend
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.models.context import Context
from sparse_lm.models.counting import Part, Setting, elementwise, product
from sparse_lm.parameter import gather_weight, init_matrix

# (forward, backward) FLOPs per element, see `models.counting`.
SCORE = (6, 11)  # per head and key
MASK = (3, 4)  # per key
ROTATED = (3, 7)  # per feature of the queries and keys


class Cache(NamedTuple):
    """Keys and values of T places, and which places hold a token that may be attended to."""

    key: Float[Array, "B T N h"]
    value: Float[Array, "B T N h"]
    filled: Bool[Array, "B T"]


class FullAttention(nnx.Module):
    """H heads of width h over all earlier tokens of a document, N = kv_heads of them with keys and values of their own.

    A kind of attention is such a class and an entry in `models.table`: it makes its mask from the context, keeps what
    cache it wants (any pytree), and counts its FLOPs. Options are the keyword-only arguments of its `__init__`.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        d, h, n, w = model.width, model.heads, model.kv_heads, model.head_width
        axes, scale = ("width", "heads", "head_width"), model.init_scale
        self.query = init_matrix(rngs, (d, h, w), axes, fan_in=d, scale=scale)
        self.key = init_matrix(rngs, (d, n, w), axes, fan_in=d, scale=scale)
        self.value = init_matrix(rngs, (d, n, w), axes, fan_in=d, scale=scale)
        self.out = init_matrix(rngs, (h, w, d), ("heads", "head_width", "width"), fan_in=h * w, scale=scale)
        self.rope_base, self.dtype = model.rope_base, model.dtype
        self.kv_heads, self.head_width = n, w

    def init_cache(self, rows: int, places: int) -> Cache:
        """An empty cache."""
        empty = jnp.zeros((rows, places, self.kv_heads, self.head_width), self.dtype)
        return Cache(empty, empty, jnp.zeros((rows, places), bool))

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Cache | None]:
        """The output, and with a cache the one with this pass's keys and values, which is what is attended to."""
        project = lambda parameter: linear(x, gather_weight(parameter, x.dtype))
        query = rotate(project(self.query), context.positions, self.rope_base)
        key = rotate(project(self.key), context.positions, self.rope_base)
        value = project(self.value)
        if cache is None:
            place = jnp.arange(x.shape[1])
            same = context.segments[:, :, None] == context.segments[:, None, :]
            mask = same & self.sees(place[:, None], place)
        else:
            new = Cache(key, value, context.valid)
            cache = Cache(*(lay_out(write(old, rows, context.cache_start)) for old, rows in zip(cache, new)))
            key, value, filled = cache
            place = context.cache_start[:, None] + jnp.arange(x.shape[1])
            mask = filled[:, None] & self.sees(place[..., None], jnp.arange(filled.shape[1]))
        query, key, value = (constrain(t, "batch", None, "heads", None) for t in (query, key, value))
        y = attend(query, key, value, mask)
        y = linear(y.reshape(*x.shape[:2], -1), gather_weight(self.out, x.dtype).reshape(-1, x.shape[-1]))
        return constrain(y, "batch", None, None), cache

    def sees(self, query: Int[Array, "*L 1"], key: Int[Array, "T"]) -> Bool[Array, "*L T"]:
        """Which keys a query attends to among those of its document, by their places in the row."""
        return key <= query

    def flops(self, setting: Setting) -> Iterator[Part]:
        """Per token: each query is needed against the L/2 keys before it on average, and run against all L."""
        _, heads, width = self.query.shape
        projections = sum(2 * math.prod(p.shape) for p in (self.query, self.key, self.value, self.out))
        yield product("attention projections", projections, again=setting.products_again)
        scores = 2 * heads * width * setting.length
        yield product("attention scores", scores, executed=2, again=setting.rest_again)
        rotated = (heads + self.kv_heads) * width
        counts = [(heads * setting.length, SCORE), (setting.length, MASK), (rotated, ROTATED)]
        yield from elementwise(counts, setting)


def write(stored: Array, new: Array, start: Int[Array, "B"]) -> Array:
    """A cache with new entries [B, L, …] from each row's own place on."""
    one = lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0)
    return jax.vmap(one)(stored, new, start)


def lay_out(stored: Array) -> Array:
    """A cache's array laid out over the mesh: rows as a batch, heads as the parameters' are."""
    return constrain(stored, "batch", None, *("heads", None)[: stored.ndim - 2])


def rotate(x: Float[Array, "B L H h"], positions: Int[Array, "B L"], base: float) -> Float[Array, "B L H h"]:
    """Rotary positions: feature i and i + h/2 are turned by the angle position / base^(2 i / h), in float32."""
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions[..., None] * frequency)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * jnp.cos(angle) - second * jnp.sin(angle), second * jnp.cos(angle) + first * jnp.sin(angle))
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
