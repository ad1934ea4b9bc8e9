"""A decoder-only language model: an embedding, the layers of a stack, and logits.

Each place of the stack's period is one layer with parameters stacked over the n repeats, and the repeats are scanned.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm import config as configs
from sparse_lm.experts import dropout
from sparse_lm.kernels.linear import linear
from sparse_lm.mesh import constrain
from sparse_lm.models.context import Aux, Context
from sparse_lm.models.depth import SkippedLayer
from sparse_lm.models.layer import Layer, RMSNorm
from sparse_lm.parameter import gather_weight, init_matrix
from sparse_lm.routing import router_of
from sparse_lm.stack import LayerSpec, Stack, decoder_stack


class Output(NamedTuple):
    """logits, float32; aux of the routed layers, stacked [R, …] in their order, None where there are none; new
    caches."""

    logits: Float[Array, "B L V"]
    aux: Aux | None
    caches: Any


class Decoder(nnx.Module):
    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        self.model, self.stack = model, decoder_stack(model)
        d, v = model.width, model.vocabulary
        # Tokens enter as sqrt(D) times a row of standard deviation 1/sqrt(D), so that the same table, unscaled, gives
        # logits of order 1.
        self.embedding = init_matrix(rngs, (v, d), ("vocabulary", "table_width"), fan_in=d, scale=1.0)
        self.prefix = nnx.List([make_layer(model, spec, rngs) for spec in self.stack.prefix])
        self.period = nnx.List([make_repeated(model, spec, self.stack.repeats, rngs) for spec in self.stack.period])
        self.norm = RMSNorm(d)
        output = lambda: init_matrix(rngs, (v, d), ("vocabulary", "table_width"), fan_in=d, scale=model.init_scale)
        self.output = None if model.tied_embeddings else output()

    def __call__(
        self,
        ids: Int[Array, "B L"],
        context: Context,
        router_state: Any,
        key: jax.Array | None = None,
        replay: Any = None,
        caches: Any = None,
    ) -> Output:
        """Logits of the next token at every position.

        Args:
            ids: tokens.
            context: what every layer is given alike.
            router_state: what `Functional.init_router_state` gave, or a later one.
            key: turns on what training does at random (jitter, dropout).
            replay: `Aux.chosen` of an earlier pass, to take instead of the routers' own choice; or a `routing.Replay`
                of it, with `on` [R], to be known only when it runs.
            caches: of the layers, as `Functional.init_caches` makes them.
        """
        model, stack = self.model, self.stack
        of_prefix, of_period = split_routed((router_state.get("routed", {}), replay), stack)
        prefix_caches, period_caches = ([None] * len(stack.prefix), None) if caches is None else caches
        # Looked up in float32: the gradient adds up a row for each occurrence of a token, too many for bfloat16.
        with jax.named_scope("embedding"):
            rows = jnp.take(gather_weight(self.embedding, "float32"), ids, axis=0) * model.width**0.5
            x = constrain(rows.astype(model.dtype), "batch", None, None)
        keys = [None] * (len(stack.prefix) + 2) if key is None else jax.random.split(key, len(stack.prefix) + 2)
        x = dropout(x, model.dropout, keys[0])

        prefix_aux, new_prefix = [], []
        for layer, layer_key, (state, indices), cache in zip(self.prefix, keys[1:-1], of_prefix, prefix_caches):
            run = lambda x, layer=layer, s=state, k=layer_key, i=indices, c=cache: layer(x, context, s, k, i, c)
            x, (aux, cache) = remat(run, model.remat)(x)
            prefix_aux += [] if aux is None else [aux]
            new_prefix.append(cache)

        graphs, parameters = zip(*(nnx.split(layer) for layer in self.period))

        def period(x, inputs):
            parameters, by_place, key, caches = inputs
            keys = [None] * len(graphs) if key is None else jax.random.split(key, len(graphs))
            caches = [None] * len(graphs) if caches is None else caches
            period_aux, new_caches = [], []
            for graph, weights, (state, indices), layer_key, cache in zip(graphs, parameters, by_place, keys, caches):
                layer: Layer = nnx.merge(graph, weights)
                x, (aux, cache) = layer(x, context, state, layer_key, indices, cache)
                period_aux += [] if aux is None else [aux]
                new_caches.append(cache)
            return x, (period_aux, new_caches)

        x, (period_aux, new_period) = jax.lax.scan(
            remat(period, model.remat, scanned=model.scan),
            x,
            (parameters, of_period, None if key is None else jax.random.split(keys[-1], stack.repeats), period_caches),
            length=stack.repeats,
            unroll=1 if model.scan else stack.repeats,
        )
        table = self.embedding if self.output is None else self.output
        with jax.named_scope("output"):
            x, table = self.norm(x), gather_weight(table, x.dtype)
            logits = linear(x, table.T, jnp.float32)
        aux = join_routed(prefix_aux, period_aux)
        return Output(constrain(logits, "batch", None, "logits"), aux, (new_prefix, new_period))


def make_layer(model: configs.Model, spec: LayerSpec, rngs: nnx.Rngs) -> Layer | SkippedLayer:
    """The layer of a spec: one whose tokens a router sends to experts inside, or past the whole layer."""
    return (SkippedLayer if spec.routed and router_of(model).skips_layers else Layer)(model, spec, rngs)


def make_repeated(model: configs.Model, spec: LayerSpec, repeats: int, rngs: nnx.Rngs) -> Layer | SkippedLayer:
    """The layer with parameters of all its repeats, whose first axis is "layers"."""
    stacked = nnx.vmap(lambda rngs: make_layer(model, spec, rngs))(rngs.split(repeats))
    for _, parameter in nnx.iter_graph(stacked):
        if isinstance(parameter, nnx.Param):
            parameter.set_metadata(axes=("layers", *parameter.get_metadata("axes")))
    return stacked


def split_routed(by_layer: Any, stack: Stack) -> tuple[list, list]:
    """Arrays [R, …] over the routed layers as one tree for each place of the prefix, and one, [n, …] over the repeats,
    for each of the period; a pair of None for layers that are not routed."""
    first, count = (sum(spec.routed for spec in part) for part in (stack.prefix, stack.period))
    prefix = iter([jax.tree.map(lambda a, i=i: a[i], by_layer) for i in range(first)])
    period = iter([jax.tree.map(lambda a, i=i: a[first + i :: count], by_layer) for i in range(count)])
    of = lambda part, trees: [next(trees) if spec.routed else (None, None) for spec in part]
    return of(stack.prefix, prefix), of(stack.period, period)


def join_routed(prefix: list[Aux], period: list[Aux]) -> Aux | None:
    """Reports of the prefix's routed layers and of the period's places, [n, …] each, as one [R, …] by layer."""
    if not prefix and not period:
        return None
    interleave = lambda *arrays: jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
    parts = [jax.tree.map(lambda a: a[None], aux) for aux in prefix]
    if period:
        parts.append(jax.tree.map(interleave, *period) if len(period) > 1 else period[0])
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if len(parts) > 1 else parts[0]


def remat(function: Callable, policy: str, scanned: bool = False) -> Callable:
    """The function with less kept for its backward pass: `full` keeps its inputs alone, `dots` also matrix products.

    Outside a scan the compiler would merge what is computed again with what was there.
    """
    if policy == "none":
        return function
    saved = None if policy == "full" else jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=saved, prevent_cse=not scanned)
