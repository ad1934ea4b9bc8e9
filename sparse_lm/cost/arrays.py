"""The parameter arrays of a model by layer, as the modules declare them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from sparse_lm.config import Model
from sparse_lm.models import functional
from sparse_lm.parameter import Axes, key_names

# The part of an array is the first of these names in its path. Other arrays are norms.
PARTS = ("router", "experts", "shared", "attention", "feed_forward", "embedding", "output")


@dataclass(frozen=True)
class ParameterArray:
    """One parameter array of one layer."""

    layer: int | None  # None: outside the layers
    path: tuple[str, ...]  # within the layer
    axes: Axes
    shape: tuple[int, ...]

    @property
    def part(self) -> str:
        """embedding, attention, feed_forward, experts, shared_experts, router, norms or output."""
        found = next((part for part in PARTS if part in self.path), "norms")
        return "shared_experts" if found == "shared" else found

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Inputs and outputs of the matrix, or of one expert's or block's; heads and head width are one axis."""
        shape = self.shape[1:] if self.axes[0] in ("experts", "blocks") else self.shape
        input_axes = 1 if self.axes[0] != "heads" else 2
        return math.prod(shape[:input_axes]), math.prod(shape[input_axes:])


def parameter_arrays(model: Model) -> Iterator[ParameterArray]:
    """Yields the arrays of a resolved model."""
    fns = functional(model)
    axes = dict(_named_leaves(fns.axes, is_leaf=lambda a: isinstance(a, tuple)))
    for path, leaf in _named_leaves(fns.shapes):
        if path[0] not in ("prefix", "period"):
            yield ParameterArray(None, path, axes[path], leaf.shape)
            continue
        part, place, *path_in_layer = path
        stacked = part == "period"
        for layer in fns.stack.layer_numbers(part, place):
            yield ParameterArray(layer, tuple(path_in_layer), axes[path][stacked:], leaf.shape[stacked:])


def _named_leaves(tree, **options) -> list[tuple[tuple, object]]:
    return [(key_names(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree, **options)]
