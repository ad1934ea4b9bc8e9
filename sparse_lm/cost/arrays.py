"""Every parameter array of a model by logical layer, as the modules themselves declare it."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from sparse_lm.config import Mesh, Model
from sparse_lm.mesh import RULES
from sparse_lm.models import functional
from sparse_lm.parameter import Axes, is_hidden_matrix, key_names

# The part that an array counts for, by a name in its path; the first that is found. Norms are named by their parent.
PARTS = ("router", "experts", "shared", "attention", "feed_forward", "embedding", "output")


@dataclass(frozen=True)
class ParameterArray:
    """One parameter array of one layer (None: outside the layers)."""

    layer: int | None
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
    def matrix(self) -> tuple[int, int]:
        """Inputs and outputs of the matrix, of one expert or block where there are several; heads and their width are
        one."""
        shape = self.shape[1:] if self.axes[0] in ("experts", "blocks") else self.shape
        inputs = 1 if self.axes[0] != "heads" else 2
        return math.prod(shape[:inputs]), math.prod(shape[inputs:])

    @property
    def orthogonalised(self) -> bool:
        """Whether Muon's update of it is orthogonal."""
        return is_hidden_matrix(self.axes)

    def on_device(self, mesh: Mesh) -> "Array":
        """What one device of a mesh, whose sizes are all given, holds of it; a ragged division is rounded up."""
        shape = (
            -(-n // math.prod(getattr(mesh, m) for m in RULES[axis]))
            for axis, n in zip(self.axes, self.shape, strict=True)
        )
        return dataclasses.replace(self, shape=tuple(shape))


def parameter_arrays(model: Model) -> Iterator[ParameterArray]:
    """The arrays of a resolved model, those of each layer together."""
    fns = functional(model)
    axes = dict(_named_leaves(fns.axes, is_leaf=lambda a: isinstance(a, tuple)))
    for path, leaf in _named_leaves(fns.shapes):
        if path[0] not in ("prefix", "period"):
            yield ParameterArray(None, path, axes[path], leaf.shape)
            continue
        part, place, *inside = path
        stacked = part == "period"
        for layer in fns.stack.layer_numbers(part, place):
            yield ParameterArray(layer, tuple(inside), axes[path][stacked:], leaf.shape[stacked:])


def _named_leaves(tree, **options) -> list[tuple[tuple, object]]:
    return [(key_names(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree, **options)]
