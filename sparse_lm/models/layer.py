"""One layer of a stack: attention, then a feed-forward part. Returns (x, (aux, cache))."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.experts import dropout
from sparse_lm.models.context import Aux, Context
from sparse_lm.models.counting import Part, Setting, elementwise
from sparse_lm.models.table import ATTENTIONS, FEED_FORWARDS
from sparse_lm.parameter import init_ones
from sparse_lm.registry import create
from sparse_lm.routing import Replay, Router
from sparse_lm.stack import LayerSpec

WIDTH = (10, 28)  # (forward, backward) FLOPs per feature of two norms and two residual additions


class RMSNorm(nnx.Module):
    """x over its root mean square, times a trained scale, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int):
        self.scale = init_ones((width,), ("norm",))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6)
        return (wide * self.scale[...]).astype(x.dtype)


class Layer(nnx.Module):
    """Pre-norm residual layer of the kinds that its spec names."""

    def __init__(self, model: configs.Model, spec: LayerSpec, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(model.width)
        self.attention = create("model.attention", ATTENTIONS, spec.attention, model, rngs)
        self.feed_forward_norm = RMSNorm(model.width)
        self.feed_forward = create("model.feed_forward", FEED_FORWARDS, spec.feed_forward, model, spec.hidden, rngs)
        self.width, self.dropout = model.width, model.dropout

    @property
    def router(self) -> Router | None:
        return self.feed_forward.router

    def init_cache(self, rows: int, places: int) -> Any:
        """An empty cache, of whatever form the attention has."""
        return self.attention.init_cache(rows, places)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any = None,
        key: jax.Array | None = None,
        replay: jax.Array | Replay | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Aux | None, Any]]:
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), context, cache)
        x += dropout(y, self.dropout, keys[0])
        y, aux = self.feed_forward(self.feed_forward_norm(x), context, state, keys[1], replay)
        return x + dropout(y, self.dropout, keys[2]), (aux, cache)

    def flops(self, setting: Setting) -> Iterator[Part]:
        """Per token."""
        yield from self.attention.flops(setting)
        yield from self.feed_forward.flops(setting)
        yield from elementwise([(self.width, WIDTH)], setting)
