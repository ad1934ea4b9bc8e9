"""One layer of a decoder: attention, then a feed-forward layer or a mixture of experts. Returns (x, aux)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.experts import EXECUTORS
from sparse_lm.mesh import constrain
from sparse_lm.models.attention import Attention, Cache
from sparse_lm.models.feed_forward import FeedForward, dropout
from sparse_lm.parameter import ones
from sparse_lm.registry import create, lookup
from sparse_lm.routing import ROUTERS


class Context(NamedTuple):
    """What every layer of a forward pass is given alike."""

    ids: Int[Array, "B L"]
    valid: Bool[Array, "B L"]  # False for padding
    positions: Int[Array, "B L"]
    mask: Bool[Array, "B L T"]  # who attends to whom
    capacity_factor: float  # inf: dropless
    cache_start: Int[Array, ""] | None = None  # where in the caches this pass writes


class Aux(NamedTuple):
    """What an expert layer reports beside its output; a dense layer reports None."""

    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, jax.Array]
    experts: Int[Array, "G S K"]  # the experts chosen; given back to a forward pass, they replay its routing


class RMSNorm(nnx.Module):
    """x over its root mean square, times a trained scale, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int):
        self.scale = ones((width,), ("norm",))

    def __call__(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt((wide**2).mean(axis=-1, keepdims=True) + 1e-6)
        return (wide * self.scale[...]).astype(x.dtype)


class ExpertLayer(nnx.Module):
    """Router, placement and experts in place of a feed-forward layer: x [B, L, D] to [B, L, D].

    Tokens are routed in groups of S consecutive ones in the order of the rows. A token without a place has output 0, so
    that the residual branch passes it on unchanged.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.experts = FeedForward(model, model.expert_width, rngs, model.experts, model.expert_dropout)
        self.router = create("model.router", ROUTERS, model.router, model, rngs)
        self.executor = lookup("model.executor", EXECUTORS, model.executor) and model.executor
        self.model = model

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, state: Any, key: jax.Array | None, given: jax.Array | None
    ) -> tuple[Float[Array, "B L D"], Aux]:
        model = self.model
        route_key, drop_key = (None, None) if key is None else jax.random.split(key)
        size = min(model.group_size, x.shape[0] * x.shape[1])
        group = lambda t: constrain(t.reshape(-1, size, *t.shape[2:]), "groups", *[None] * (t.ndim - 1))
        grouped = group(x)
        choice, losses, statistics = self.router.route(
            grouped, group(context.ids), group(context.valid), state, route_key, given
        )
        capacity = configs.capacity(size, model.experts, model.top_k, context.capacity_factor)
        compute = lambda sent: self.experts(sent, drop_key)
        y, dropped = EXECUTORS[self.executor](grouped, choice, compute, model.experts, capacity)
        aux = Aux(losses, statistics | {"dropped": dropped}, choice.expert)
        return constrain(y.reshape(x.shape), "batch", None, None), aux


class Layer(nnx.Module):
    """Pre-norm residual layer. `expert` says whether it stands at an expert layer's place."""

    def __init__(self, model: configs.Model, expert: bool, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(model.width)
        self.attention = Attention(model, rngs)
        self.feed_forward_norm = RMSNorm(model.width)
        self.sparse = expert and model.experts > 0
        if self.sparse:
            self.feed_forward = ExpertLayer(model, rngs)
        else:
            self.feed_forward = FeedForward(model, model.expert_width if expert else model.ffn_width, rngs)
        self.dropout = model.dropout

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any = None,
        key: jax.Array | None = None,
        given: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Aux | None, Cache | None]]:
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        cached = None if cache is None else (cache, context.cache_start)
        y, cache = self.attention(self.attention_norm(x), context.positions, context.mask, cached)
        x += dropout(y, self.dropout, keys[0])
        normed = self.feed_forward_norm(x)
        if self.sparse:
            y, aux = self.feed_forward(normed, context, state, keys[1], given)
        else:
            y, aux = self.feed_forward(normed), None
        return x + dropout(y, self.dropout, keys[2]), (aux, cache)
