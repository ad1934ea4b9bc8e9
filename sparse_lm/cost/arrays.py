"""Every parameter array of a model, from its config alone: name, shape, and what each axis means."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_lm.config import Mesh, Model

# The axes of the mesh that divide an axis of a parameter array, as in `sparse_lm.mesh.RULES`.
DIVIDED_OVER: dict[str, tuple[str, ...]] = {
    "vocabulary": ("fsdp", "tensor"),
    "table_width": (),
    "norm": (),
    "width": ("fsdp",),
    "heads": ("tensor",),
    "head_width": (),
    "router_experts": (),
    "experts": ("expert",),
    "hidden": ("tensor",),
}


@dataclass(frozen=True)
class Array:
    """One parameter array of one layer (None: outside the layers)."""

    layer: int | None
    part: str  # embedding, attention, feed_forward, experts, router, norms, output
    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of the matrix, of one expert's where there are experts; heads and their width are one."""
        shape = self.shape[1:] if self.axes[0] == "experts" else self.shape
        inputs = 1 if self.axes[0] != "heads" else 2
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

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
    D, F, E = model.width, model.layer_width(layer), model.experts
    part, axes, shape = "feed_forward", (), ()
    if E and model.is_expert_layer(layer):
        yield Array(layer, "router", "kernel", ("width", "router_experts"), (D, E))
        part, axes, shape = "experts", ("experts",), (E,)
    for name in ("in", "gate") if model.gated else ("in",):
        yield Array(layer, part, name, axes + ("width", "hidden"), shape + (D, F))
    yield Array(layer, part, "out", axes + ("hidden", "width"), shape + (F, D))
