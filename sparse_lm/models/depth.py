"""A layer that some tokens pass and the others skip (Raposo et al. 2024, arXiv 2404.02258, section 3)."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.models.context import Aux, Context
from sparse_lm.models.counting import Part, Setting, product
from sparse_lm.models.expert_layer import experts_per_token, router_flops
from sparse_lm.models.layer import Layer
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS, Replay, Routing, chosen_indices, indices_to_replay
from sparse_lm.stack import LayerSpec


class SkippedLayer(nnx.Module):
    """A dense layer for C tokens of each row, which attend to each other alone. Tokens outside leave as they came.

    In generation each token is routed by itself; the layer is then computed for every token, and used where it passes.
    To the layer inside, a token that does not pass is padding.
    """

    def __init__(self, model: configs.Model, spec: LayerSpec, rngs: nnx.Rngs):
        if spec.feed_forward.name != "experts":
            raise UserError(
                f"model.feed_forward is {spec.feed_forward.name!r}; it must be 'auto' with the router "
                f"{model.router.name!r}, whose tokens skip dense layers"
            )
        self.router = create("model.router", ROUTERS, model.router, model, rngs)
        dense = dataclasses.replace(spec, feed_forward=configs.choice("dense"), routed=False)
        self.layer = Layer(model, dense, rngs)
        self.share = experts_per_token(model)  # of the tokens that pass, in training

    def init_cache(self, rows: int, places: int) -> Any:
        return self.layer.init_cache(rows, places)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any = None,
        key: jax.Array | None = None,
        replay: jax.Array | Replay | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B L D"], tuple[Aux, Any]]:
        if context.alone:
            return self._route_alone(x, context, state, cache)
        route_key, layer_key = (None, None) if key is None else jax.random.split(key)
        with jax.named_scope("router"):
            inputs = (x, context.ids, context.valid, state, route_key)
            indices = indices_to_replay(replay, lambda: self.router.route(*inputs))
            routing = self.router.route(*inputs, indices)
        token, weight = routing.choice.token[:, 0], routing.choice.weight[:, 0]
        passes, index = token >= 0, jnp.maximum(token, 0)  # [B, C], in the order of the row
        take = lambda t: jnp.take_along_axis(t, index.reshape(*index.shape, *[1] * (t.ndim - 2)), axis=1)
        among = context._replace(
            ids=take(context.ids),
            segments=jnp.where(passes, take(context.segments), 0),
            positions=take(context.positions),
        )
        inside = take(x)
        y, _ = self.layer(inside, among, None, layer_key)
        change = jnp.where(passes[..., None], weight[..., None].astype(x.dtype) * (y - inside), 0)
        x = jax.vmap(lambda row, index, change: row.at[index].add(change))(x, index, change)
        return x, (_report(routing), None)

    def _route_alone(self, x, context, state, cache):
        routing = self.router.route_alone(x, context.ids, context.valid, state)
        passes = routing.choice.token.reshape(x.shape[:2]) >= 0
        among = context._replace(segments=jnp.where(passes, context.segments, 0))
        y, (_, cache) = self.layer(x, among, cache=cache)
        weight = jnp.where(passes, routing.choice.weight.reshape(passes.shape), 0)[..., None].astype(x.dtype)
        return x + weight * (y - x), (_report(routing), cache)

    def flops(self, setting: Setting) -> Iterator[Part]:
        """Per token of the row: the router for each, the layer for those that pass, which see those alone."""
        yield product("router", router_flops(self.router), again=setting.products_again)
        inside = self.layer.flops(setting._replace(length=self.share * setting.length))
        yield from (part.times(self.share) for part in inside)


def _report(routing: Routing) -> Aux:
    return Aux(routing.losses, routing.statistics | {"dropped": jnp.zeros(())}, chosen_indices(routing.choice))
