"""A decoder as pure functions of its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.models.decoder import Decoder, Output, make_layer
from sparse_lm.stack import LayerSpec, decoder_stack


class Functional:
    """Pure functions of parameters, a nested dict of float32 arrays.

    stack: the layers. shapes: the parameters as `jax.ShapeDtypeStruct`. axes: the same nested dict with the axis names
    of each parameter, "layers" first where it is stacked.
    """

    def __init__(self, model: configs.Model):
        """Of the decoder that a resolved config describes. Allocates nothing.

        Raises `UserError` for a router, option or executor that does not exist or does not fit the model.
        """
        self.model, self.stack = model, decoder_stack(model)
        self._graph, state = nnx.split(nnx.eval_shape(self._build, jax.random.key(0)))
        decoder: Decoder = nnx.merge(self._graph, state)
        self._prefix, self._period = list(decoder.prefix), list(decoder.period)
        self._router = next((layer.router for layer in (*self._prefix, *self._period) if layer.router), None)
        of_parameters = lambda f: nnx.to_pure_dict(
            jax.tree.map(lambda p: p.replace(f(p)), state, is_leaf=lambda p: isinstance(p, nnx.Variable))
        )
        self.shapes: dict = of_parameters(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype))
        self.axes: dict = of_parameters(lambda p: p.get_metadata("axes"))

    def _build(self, key: jax.Array) -> Decoder:
        return Decoder(self.model, nnx.Rngs(params=key))

    def init(self, key: jax.Array) -> dict:
        """New parameters."""
        return nnx.to_pure_dict(nnx.state(self._build(key)))

    def apply(self, parameters: dict, *args, **kwargs) -> Output:
        """`Decoder.__call__` with these parameters."""
        decoder: Decoder = nnx.merge(self._graph, nnx.State(parameters))
        return decoder(*args, **kwargs)

    def init_router_state(self) -> dict:
        """{"routed": arrays [R, …] over the routed layers}, {} where no router has a state."""
        state = self._router.init_state() if self._router else {}
        routed = len(self.stack.routed_layers)
        return {"routed": jax.tree.map(lambda leaf: jnp.stack([leaf] * routed), state)} if state else {}

    def update_router_state(self, state: dict, statistics: dict) -> dict:
        """The next state, from the statistics of a whole batch."""
        return {"routed": jax.vmap(self._router.update)(state["routed"], statistics)} if state else state

    def init_caches(self, rows: int, places: int) -> Any:
        """Empty caches of all layers, for B = rows and T = places."""
        repeated = lambda leaf: jnp.broadcast_to(leaf, (self.stack.repeats, *leaf.shape))
        period = [jax.tree.map(repeated, layer.init_cache(rows, places)) for layer in self._period]
        return [layer.init_cache(rows, places) for layer in self._prefix], period


def functional(model: configs.Model) -> Functional:
    """The functional form of the decoder that a resolved config describes; see `Functional`."""
    return Functional(model)


def abstract_layer(model: configs.Model, spec: LayerSpec) -> Any:
    """The module of one layer whose arrays are shapes alone: what it counts of itself."""
    return nnx.eval_shape(lambda: make_layer(model, spec, nnx.Rngs(params=0)))
