"""The state of a training run, and how it is laid out over a mesh."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sparse_lm.mesh import sharding
from sparse_lm.models import Functional
from sparse_lm.parameter import Axes, key_names
from sparse_lm.step.anticipation import Anticipation


class TrainState(NamedTuple):
    """All that a step changes, and the seed: randomness is a function of the seed and the step."""

    seed: jax.Array  # int32; an array, so that runs of other seeds share the compiled program
    step: jax.Array  # steps done, int32
    parameters: dict  # float32
    optimizer: Any
    router: dict
    tokens: jax.Array  # trained on so far, in two int32: millions, and the rest
    skipped: jax.Array  # steps skipped for a non-finite gradient, int32
    skipped_in_a_row: jax.Array
    anticipation: Anticipation | None  # where choices of experts are made ahead


def count_tokens(tokens: np.ndarray) -> int:
    """The number that the two int32 of `TrainState.tokens` stand for."""
    return int(tokens[0]) * 10**6 + int(tokens[1])


def add_tokens(tokens: jax.Array, more: jax.Array) -> jax.Array:
    """`TrainState.tokens` after so many more."""
    millions, rest = tokens[0], tokens[1] + more.astype(np.int32)
    return jax.numpy.stack([millions + rest // 10**6, rest % 10**6])


def with_shardings(state: Any, functional: Functional, mesh: Mesh | AbstractMesh) -> Any:
    """An abstract state, or a part of one, with shardings: each parameter by its axes, each array of the optimizer by
    those of its parameter, all else whole on every device."""
    is_axes = lambda a: isinstance(a, tuple)
    named = {key_names(path): axes for path, axes in jax.tree.leaves_with_path(functional.axes, is_leaf=is_axes)}
    shapes = {key_names(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(functional.shapes)}

    def place(path, leaf):
        keys = key_names(path)
        for start in range(len(keys)):
            for stop in range(len(keys), start, -1):
                if (parameter := keys[start:stop]) in named:
                    fitting = match_axes(leaf.shape, shapes[parameter], named[parameter])
                    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, *fitting))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map_with_path(place, state)


def match_axes(shape: tuple, of: tuple, axes: Axes) -> list[str | None]:
    """The axes of an array whose shape is a subsequence of its parameter's (a factored moment lacks a dimension)."""
    left = list(zip(of, axes))
    found = []
    for size in shape:
        while left and left[0][0] != size:
            left.pop(0)
        found.append(left.pop(0)[1] if left else None)
    return found
