"""A layer that some tokens pass and the others skip (Raposo et al. 2024, arXiv 2404.02258, section 3)."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparse_lm import config as configs
from sparse_lm.models.attention import Cache
from sparse_lm.models.layer import Aux, Context, Layer
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS, Given, chosen, taken


class SparseCache(NamedTuple):
    """Keys and values of T positions, and which of them passed the layer."""

    stored: Cache
    passed: Bool[Array, "B T N 1"]  # the same for every head


class SkippedLayer(nnx.Module):
    """A dense layer for C tokens of each row, which attend to each other alone. Tokens outside leave as they came.

    In generation each token is routed by itself; the layer is then computed for every token, and used where it passes.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.router = create("model.router", ROUTERS, model.router, model, rngs)
        self.layer = Layer(dataclasses.replace(model, experts=0), True, rngs)

    def init_cache(self, rows: int, positions: int) -> SparseCache:
        stored = self.layer.init_cache(rows, positions)
        return SparseCache(stored, jnp.zeros((*stored.key.shape[:3], 1), bool))

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any = None,
        key: jax.Array | None = None,
        given: jax.Array | Given | None = None,
        cache: SparseCache | None = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Aux, SparseCache | None]]:
        if context.alone:
            if cache is not None:
                return self._alone(x, context, state, cache)
            unkept, start = self.init_cache(*x.shape[:2]), jnp.zeros((), jnp.int32)
            x, (aux, _) = self._alone(x, context._replace(cache_start=start), state, unkept)
            return x, (aux, None)
        route_key, layer_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("router"):
            inputs = (x, context.ids, context.valid, state, route_key)
            given = taken(given, lambda: self.router.route(*inputs))
            choice, losses, statistics = self.router.route(*inputs, given)
        token, here = choice.token[:, 0], choice.token[:, 0] >= 0
        take = lambda t: jnp.take_along_axis(
            t, jnp.maximum(token, 0).reshape(*token.shape, *[1] * (t.ndim - 2)), axis=1
        )
        mask = jnp.take_along_axis(take(context.mask), jnp.maximum(token, 0)[:, None], axis=2)
        among = Context(
            take(context.ids),
            here,
            take(context.positions),
            mask & here[:, None] & here[..., None],
            context.capacity_factor,
        )
        inside = take(x)
        y, _ = self.layer(inside, among, None, layer_key)
        change = jnp.where(here[..., None], choice.weight[:, 0, :, None].astype(x.dtype) * (y - inside), 0)
        x = jax.vmap(lambda row, index, change: row.at[index].add(change))(x, jnp.maximum(token, 0), change)
        return x, (Aux(losses, statistics | {"dropped": jnp.zeros(())}, chosen(choice)), None)

    def _alone(self, x, context, state, cache):
        routing = self.router.route_alone(x, context.ids, context.valid, state)
        passes = routing.choice.token.reshape(x.shape[:2]) >= 0
        heads = cache.passed.shape[2]
        passed = jax.lax.dynamic_update_slice_in_dim(
            cache.passed,
            jnp.broadcast_to(passes[..., None, None], (*passes.shape, heads, 1)),
            context.cache_start,
            axis=1,
        )
        context = context._replace(mask=context.mask & passed[:, None, :, 0, 0])
        y, (_, stored) = self.layer(x, context, cache=cache.stored)
        weight = jnp.where(passes, routing.choice.weight.reshape(passes.shape), 0)[..., None].astype(x.dtype)
        aux = Aux(routing.losses, routing.statistics | {"dropped": jnp.zeros(())}, chosen(routing.choice))
        return x + weight * (y - x), (aux, SparseCache(stored, passed))
