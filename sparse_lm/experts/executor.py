"""What an executor is, what it is given, and what the executors with a capacity share."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.experts.expert import apply_expert
from sparse_lm.mesh import constrain
from sparse_lm.routing import Choice, Placement, TokenChoice


class Experts(NamedTuple):
    """E experts, as an executor is given them; `apply_expert` is what each of them computes.

    Attributes:
        weights: by name ("into", "out" and, where gated, "gate"), each [E, inputs, outputs], in the dtype of the
            computation.
        axes: the names of the axes of each of the weights, which `mesh.RULES` maps to the mesh.
        activation: a name in `expert.ACTIVATIONS`.
        dropout_rate: the share of hidden units that dropout zeroes in training.
        key: for dropout; None outside training.
        buffer: the rows that a device can receive, as a multiple of an even share (`model.exchange_buffer`); inf: all.
        passed: how many experts a token passes through on average.
    """

    weights: dict[str, Float[Array, "E _ _"]]
    axes: dict[str, tuple[str | None, ...]]
    activation: str
    dropout_rate: float = 0.0
    key: jax.Array | None = None
    buffer: float = math.inf
    passed: int = 1

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.weights["into"])


class Executor(NamedTuple):
    """A way to compute experts. All executors compute the same, whatever the capacity.

    Attributes:
        run: (x [G, S, D], choice, experts, capacity) -> (y [G, S, D], number of choices dropped []). A token whose
            choices are all dropped has an output of 0.
        forms: the forms of choice that it takes.
    """

    run: Callable
    forms: tuple[type[Choice], ...]


def run_experts(experts: Experts, dispatched: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
    """Applies each expert to the rows in its C places of each group, on the devices that hold the expert.

    Over a mesh, rows reach their experts by an all-to-all over the expert axis, and their outputs return by another.
    Layouts are pinned on both sides of each, so that the backward pass consists of the same two in reverse.

    Args:
        experts: the E experts.
        dispatched: the rows; those in empty places are 0.

    Returns:
        The output of each row, in the same place.
    """
    by_group = lambda rows: constrain(rows, None, "groups", None, None)
    by_expert = lambda rows: constrain(rows, "experts", "dispatched_groups", None, None)

    def product(x, name):
        y = jnp.einsum("egcd,edf->egcf", x, experts.weights[name])
        return constrain(y, "experts", "dispatched_groups", None, experts.axes[name][-1])

    with jax.named_scope("experts"):
        rows = by_expert(by_group(dispatched))
        outputs = apply_expert(rows, product, experts.activation, experts.dropout_rate, experts.key)
        return by_group(by_expert(outputs))


def count_dropped(choice: TokenChoice, placement: Placement) -> Float[Array, ""]:
    """Counts the choices of an expert that got no place."""
    return ((choice.expert >= 0) & ~placement.kept).sum().astype(jnp.float32)
