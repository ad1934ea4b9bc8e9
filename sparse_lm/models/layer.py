"""One layer of a decoder: attention, then a feed-forward layer or a mixture of experts. Returns (x, aux)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.experts import EXECUTORS, Experts
from sparse_lm.mesh import constrain
from sparse_lm.models.attention import Attention, Cache
from sparse_lm.models.feed_forward import DENSE, FeedForward, dropout
from sparse_lm.parameter import ones
from sparse_lm.registry import create, lookup
from sparse_lm.routing import ROUTERS, Given, Router, TokenChoice, chosen, taken


class Context(NamedTuple):
    """What every layer of a forward pass is given alike."""

    ids: Int[Array, "B L"]
    valid: Bool[Array, "B L"]  # False for padding
    positions: Int[Array, "B L"]
    mask: Bool[Array, "B L T"]  # who attends to whom
    capacity_factor: float  # inf: dropless
    cache_start: Int[Array, ""] | None = None  # where in the caches this pass writes
    alone: bool = False  # each token is routed without looking at others, as generation must


class Aux(NamedTuple):
    """What an expert layer reports beside its output; a dense layer reports None."""

    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, jax.Array]
    chosen: Any  # what `routing.chosen` says; given back to a forward pass, it replays the routing


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
    that the residual branch passes it on unchanged. Shared experts (Dai et al. 2024, arXiv 2401.06066, section 3.2) are
    one dense layer of their joint width, added for every token.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.experts = FeedForward(model, model.expert_width, rngs, experts=model.experts, dropout=model.expert_dropout)
        self.router = create("model.router", ROUTERS, model.router, model, rngs)
        self.executor = model.executor
        _check_executor(model, self.router)
        shared = model.shared_experts * model.expert_width
        self.shared = FeedForward(model, shared, rngs) if shared else None
        self.model = model

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any,
        key: jax.Array | None,
        given: jax.Array | Given | None,
    ) -> tuple[Float[Array, "B L D"], Aux]:
        model = self.model
        route_key, drop_key = (None, None) if key is None else jax.random.split(key)
        size = min(model.group_size, x.shape[0] * x.shape[1])
        group = lambda t: constrain(t.reshape(-1, size, *t.shape[2:]), "groups", *[None] * (t.ndim - 1))
        inputs = (group(x), group(context.ids), group(context.valid), state)
        with jax.named_scope("router"):
            if context.alone:
                routing = self.router.route_alone(*inputs)
            else:
                given = taken(given, lambda: self.router.route(*inputs, route_key))
                routing = self.router.route(*inputs, route_key, given)
        capacity = configs.capacity(size, model.experts, model.top_k, context.capacity_factor)
        # Outside training nothing may overflow: what is lost depends on later tokens and on other rows.
        buffer = math.inf if key is None else model.exchange_buffer
        passed = model.top_k if isinstance(routing.choice, TokenChoice) else model.experts
        experts = Experts(*self.experts.weights(x.dtype), self.experts.layer, drop_key, buffer, passed)
        y, dropped = EXECUTORS[self.executor].run(inputs[0], routing.choice, experts, capacity)
        y = constrain(y.reshape(x.shape), "batch", None, None)
        if self.shared is not None:
            with jax.named_scope("feed_forward"):
                y += self.shared(x)
        return y, Aux(routing.losses, routing.statistics | {"dropped": dropped}, chosen(routing.choice))


def _check_executor(model: configs.Model, router: Router) -> None:
    forms = lookup("model.executor", EXECUTORS, model.executor).forms
    if router.form not in forms:
        able = ", ".join(name for name, executor in EXECUTORS.items() if router.form in executor.forms)
        raise UserError(
            f"model.executor is {model.executor!r}, which can't express the {router.form.__name__} of the router "
            f"{model.router.name!r}; these can: {able}"
        )


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
            width, blocks = (model.expert_width, model.layout) if expert else (model.ffn_width, DENSE)
            self.feed_forward = FeedForward(model, width, rngs, blocks=blocks)
        self.dropout = model.dropout
        self.cache_shape, self.dtype = (model.kv_heads, model.head_width), model.dtype

    def init_cache(self, rows: int, positions: int) -> Cache:
        """An empty cache."""
        return Cache(*(jnp.zeros((rows, positions, *self.cache_shape), self.dtype) for _ in range(2)))

    @property
    def router(self) -> Router | None:
        return self.feed_forward.router if self.sparse else None

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any = None,
        key: jax.Array | None = None,
        given: jax.Array | Given | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Aux | None, Cache | None]]:
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        cached = None if cache is None else (cache, context.cache_start)
        with jax.named_scope("attention"):
            y, cache = self.attention(self.attention_norm(x), context.positions, context.mask, cached)
        x += dropout(y, self.dropout, keys[0])
        if self.sparse:
            y, aux = self.feed_forward(self.feed_forward_norm(x), context, state, keys[1], given)
        else:
            with jax.named_scope("feed_forward"):
                y, aux = self.feed_forward(self.feed_forward_norm(x)), None
        return x + dropout(y, self.dropout, keys[2]), (aux, cache)
