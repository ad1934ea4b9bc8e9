"""A decoder-only language model, and its functional form.

Layers are a prefix of dense ones and a period repeated n times. Each place of the period is one `Layer` with parameters
stacked over the n repeats, and the repeats are scanned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm import config as configs
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.models.depth import SkippedLayer
from sparse_lm.models.feed_forward import dropout
from sparse_lm.models.layer import Aux, Context, Layer, RMSNorm
from sparse_lm.parameter import matrix, weight
from sparse_lm.registry import lookup
from sparse_lm.routing import ROUTERS


class Output(NamedTuple):
    """logits, float32; aux of the expert layers, stacked [n, …] over the repeats, None in a dense model; new caches."""

    logits: Float[Array, "B L V"]
    aux: Aux | None
    caches: Any


class Decoder(nnx.Module):
    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.model = model
        d, v = model.width, model.vocabulary
        # Tokens enter as sqrt(D) times a row of standard deviation 1/sqrt(D), so that the same table, unscaled, gives
        # logits of order 1.
        self.embedding = matrix(rngs, (v, d), ("vocabulary", "table_width"), fan_in=d, scale=1.0)
        self.prefix = nnx.List([Layer(model, False, rngs) for _ in range(model.dense_first)])
        self.period = nnx.List(
            [self._stack(model, place == model.expert_every - 1, rngs) for place in range(model.expert_every)]
        )
        self.norm = RMSNorm(d)
        output = lambda: matrix(rngs, (v, d), ("vocabulary", "table_width"), fan_in=d, scale=model.init_scale)
        self.output = None if model.tied_embeddings else output()

    @staticmethod
    def _stack(model: configs.Model, expert: bool, rngs: nnx.Rngs) -> Layer | SkippedLayer:
        skipped = expert and model.experts > 0 and lookup("model.router.name", ROUTERS, model.router.name).skips_layers
        make = (lambda rngs: SkippedLayer(model, rngs)) if skipped else (lambda rngs: Layer(model, expert, rngs))
        stacked = nnx.vmap(make)(rngs.split(model.periods))
        for _, parameter in nnx.iter_graph(stacked):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(axes=("layers", *parameter.get_metadata("axes")))
        return stacked

    def __call__(
        self,
        ids: Int[Array, "B L"],
        context: Context,
        router_state: Any,
        key: jax.Array | None = None,
        given: Any = None,
        caches: Any = None,
    ) -> Output:
        """Logits of the next token at every position.

        router_state: what `Functional.init_router_state` gave, or a later one. key: turns on what training does at
        random (jitter, dropout). given: `Aux.chosen` of an earlier pass, to take instead of the routers' own choice; or
        a `routing.Given` of it, with `on` [n], to be known only when it runs.
        caches: keys and values of the layers, as `Functional.init_caches` makes them.
        """
        model = self.model
        router_state = router_state.get("period", {}).get(model.expert_every - 1, {})
        prefix_caches, period_caches = ([None] * model.dense_first, None) if caches is None else caches
        # Looked up in float32: the gradient adds up a row for each occurrence of a token, too many for bfloat16.
        with jax.named_scope("embedding"):
            rows = jnp.take(weight(self.embedding, "float32"), ids, axis=0) * model.width**0.5
            x = constrain(rows.astype(model.dtype), "batch", None, None)
        keys = [None] * (model.dense_first + 2) if key is None else jax.random.split(key, model.dense_first + 2)
        x = dropout(x, model.dropout, keys[0])

        new_prefix = []
        for layer, layer_key, cache in zip(self.prefix, keys[1:-1], prefix_caches):
            run = _remat(lambda x, layer=layer, k=layer_key, c=cache: layer(x, context, None, k, None, c), model.remat)
            x, (_, cache) = run(x)
            new_prefix.append(cache)

        graphs, parameters = zip(*(nnx.split(layer) for layer in self.period))

        def period(x, inputs):
            parameters, state, key, given, caches = inputs
            keys = [None] * len(graphs) if key is None else jax.random.split(key, len(graphs))
            caches = [None] * len(graphs) if caches is None else caches
            new_caches = []
            for graph, weights, layer_key, cache in zip(graphs, parameters, keys, caches):
                x, (aux, cache) = nnx.merge(graph, weights)(x, context, state, layer_key, given, cache)
                new_caches.append(cache)
            return x, (aux, new_caches)  # the expert layer is the last of a period

        period_keys = None if key is None else jax.random.split(keys[-1], model.periods)
        x, (aux, new_period) = jax.lax.scan(
            _remat(period, model.remat, scanned=model.scan),
            x,
            (parameters, router_state, period_keys, given, period_caches),
            length=model.periods,
            unroll=1 if model.scan else model.periods,
        )
        table = self.embedding if self.output is None else self.output
        with jax.named_scope("output"):
            x, table = self.norm(x), weight(table, x.dtype)
            logits = linear(x, table.T, jnp.float32)
        return Output(constrain(logits, "batch", None, "logits"), aux, (new_prefix, new_period))


def _remat(function: Callable, policy: str, scanned: bool = False) -> Callable:
    """The function with less kept for its backward pass: `full` keeps its inputs alone, `dots` also matrix products.

    Outside a scan the compiler would merge what is computed again with what was there.
    """
    if policy == "none":
        return function
    saved = None if policy == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=saved, prevent_cse=not scanned)


@dataclass(frozen=True, eq=False)
class Functional:
    """A decoder as pure functions of its parameters, a nested dict of arrays.

    axes: the same nested dict with the axis names of each parameter, "layers" first where it is stacked.
    """

    init: Callable[[jax.Array], dict]  # key -> parameters, float32
    apply: Callable[..., Output]  # (parameters, *arguments of Decoder.__call__) -> Output
    axes: dict
    init_router_state: Callable[[], dict]  # at the path of its layers' parameters, stacked as they are; {} where none
    update_router_state: Callable[[dict, dict], dict]  # (state, statistics of a batch) -> state
    init_caches: Callable[[int, int], Any]  # (rows B, positions T) -> empty caches


def functional(model: configs.Model) -> Functional:
    """The functional form of the decoder that a resolved config describes. Allocates nothing.

    Raises `UserError` for a router, option or executor that does not exist or does not fit the model.
    """
    build = lambda key: Decoder(model, nnx.Rngs(params=key))
    graph, state = nnx.split(nnx.eval_shape(build, jax.random.key(0)))
    axes = nnx.to_pure_dict(
        jax.tree.map(lambda p: p.replace(p.get_metadata("axes")), state, is_leaf=lambda p: isinstance(p, nnx.Variable))
    )
    abstract = nnx.merge(graph, state)
    router = abstract.period[-1].router

    def init_router_state():
        state = router.init_state() if router else {}
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * model.periods), state)
        return {"period": {model.expert_every - 1: stacked}} if state else {}

    def update_router_state(state, statistics):
        if not state:
            return state
        place = model.expert_every - 1
        return {"period": {place: jax.vmap(router.update)(state["period"][place], statistics)}}

    def init_caches(rows: int, positions: int):
        repeated = lambda leaf: jnp.broadcast_to(leaf, (model.periods, *leaf.shape))
        period = [jax.tree.map(repeated, layer.init_cache(rows, positions)) for layer in abstract.period]
        return [layer.init_cache(rows, positions) for layer in abstract.prefix], period

    return Functional(
        init=lambda key: nnx.to_pure_dict(nnx.state(build(key))),
        apply=lambda parameters, *args, **kwargs: nnx.merge(graph, nnx.State(parameters))(*args, **kwargs),
        axes=axes,
        init_router_state=init_router_state,
        update_router_state=update_router_state,
        init_caches=init_caches,
    )
