"""Every parameter array of a model, from its config alone: name, shape, and what each axis means."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_lm.config import Mesh, Model
from sparse_lm.cost.routers import router_arrays, skips_layers
from sparse_lm.layouts import layout

# The axes of the mesh that divide an axis of a parameter array, as in `sparse_lm.mesh.RULES`.
DIVIDED_OVER: dict[str, tuple[str, ...]] = {
    "vocabulary": ("fsdp", "tensor"),
    "table_width": (),
    "norm": (),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "head_width": (),
    "router_experts": (),
    "slots": (),
    "blocks": (),
    "block_in": ("fsdp",),
    "block_out": (),
    "experts": ("expert",),
    "hidden": ("tensor",),
}


@dataclass(frozen=True)
class Array:
    """One parameter array of one layer (None: outside the layers)."""

    layer: int | None
    part: str  # embedding, attention, feed_forward, experts, shared_experts, router, norms, output
    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of the matrix, of one expert or block where there are several; heads and their width are
        one."""
        shape = self.shape[1:] if self.axes[0] in ("experts", "blocks") else self.shape
        inputs = 1 if self.axes[0] != "heads" else 2
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    @property
    def orthogonalised(self) -> bool:
        """Whether it is what Muon is for: whole matrices of attention, feed-forward layers and experts."""
        return self.part in ("attention", "feed_forward", "experts", "shared_experts") and self.axes[0] != "blocks"

    def on_device(self, mesh: Mesh) -> "Array":
        """What one device of a mesh, whose sizes are all given, holds of it; a ragged division is rounded up."""
        shape = (
            -(-n // math.prod(getattr(mesh, m) for m in DIVIDED_OVER[axis]))
            for axis, n in zip(self.axes, self.shape, strict=True)
        )
        return dataclasses.replace(self, shape=tuple(shape))


def arrays(model: Model) -> Iterator[Array]:
    """The arrays of a resolved model, in the order in which a token meets them."""
    D, H, Hkv, h = model.width, model.heads, model.kv_heads, model.head_width
    yield Array(None, "embedding", "embedding", ("vocabulary", "table_width"), (model.vocabulary, D))
    for layer in range(model.layers):
        yield Array(layer, "norms", "attention_norm", ("norm",), (D,))
        yield Array(layer, "attention", "query", ("width", "heads", "head_width"), (D, H, h))
        yield Array(layer, "attention", "key", ("width", "heads", "head_width"), (D, Hkv, h))
        yield Array(layer, "attention", "value", ("width", "heads", "head_width"), (D, Hkv, h))
        yield Array(layer, "attention", "out", ("heads", "head_width", "width"), (H, h, D))
        yield Array(layer, "norms", "feed_forward_norm", ("norm",), (D,))
        yield from _feed_forward(model, layer)
    yield Array(None, "norms", "norm", ("norm",), (D,))
    if not model.tied_embeddings:
        yield Array(None, "output", "output", ("vocabulary", "table_width"), (model.vocabulary, D))


def _feed_forward(model: Model, layer: int) -> Iterator[Array]:
    F, E = model.layer_width(layer), model.experts
    part, axes, shape = "feed_forward", (), ()
    if E and model.is_expert_layer(layer):
        for name, of_router in router_arrays(model).items():
            axes = ("width", "router_experts", "slots")[: len(of_router)] if len(of_router) > 1 else ("norm",)
            yield Array(layer, "router", name, axes, of_router)
        axes = ()
        if model.shared_experts:
            yield from _dense(model, layer, "shared_experts", (), (), model.shared_experts * F)
        if not skips_layers(model):
            part, axes, shape = "experts", ("experts",), (E,)
    yield from _dense(model, layer, part, axes, shape, F)


def _dense(model: Model, layer: int, part: str, axes: tuple, shape: tuple, hidden: int) -> Iterator[Array]:
    blocks = of_blocks(model, layer)
    for name in ("in", "gate") if model.gated else ("in",):
        if blocks:
            yield Array(layer, part, name, ("blocks", "block_in", "block_out"), blocks[0])
        else:
            yield Array(layer, part, name, axes + ("width", "hidden"), shape + (model.width, hidden))
    if blocks:
        yield Array(layer, part, "out", ("blocks", "block_in", "block_out"), blocks[1])
    else:
        yield Array(layer, part, "out", axes + ("hidden", "width"), shape + (hidden, model.width))


def of_blocks(model: Model, layer: int) -> tuple[tuple[int, int, int], tuple[int, int, int]] | None:
    """The shapes of a layer's feed-forward matrices, into the hidden units and out, where they are made of blocks."""
    if model.layout.name == "dense" or not model.is_expert_layer(layer):
        return None
    widths = (model.width, model.layer_width(layer))
    up, down = (layout(model.layout, *pair, "model.layout") for pair in (widths, widths[::-1]))
    return (up.count, up.block, up.block), (down.count, down.block, down.block)
