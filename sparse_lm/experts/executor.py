"""What an executor is, and what it computes with."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.mesh import constrain
from sparse_lm.routing import Choice, Placement, TokenChoice


class Experts(NamedTuple):
    """E feed-forward layers.

    weights: by name, each [E, inputs, outputs], in the dtype of the computation. axes: the names of their axes.
    layer: (x, product, key) -> y of x's shape, where product(x, name) multiplies x with the weights of that name, each
    row with those of its expert. key: for dropout in training. buffer: see `model.exchange_buffer`. passed: how many of
    them a token passes on average.
    """

    weights: dict[str, Float[Array, "E _ _"]]
    axes: dict[str, tuple[str | None, ...]]
    layer: Callable
    key: jax.Array | None = None
    buffer: float = math.inf
    passed: int = 1


class Executor(NamedTuple):
    """run: (x [G, S, D], choice, experts, capacity) -> (y [G, S, D], choices that got no place []).

    Every executor computes the same, whatever the capacity. forms: the forms of choice that it takes.
    """

    run: Callable
    forms: tuple[type[Choice], ...]


def by_place(experts: Experts, sent: Float[Array, "E G C D"]) -> Float[Array, "E G C D"]:
    """The experts applied to C places each, on the devices that hold the experts.

    Going there and back is an all-to-all each over the mesh's expert axis. Both layouts are pinned on either side, so
    that the backward pass takes the same way in the other direction.
    """
    by_group = lambda x: constrain(x, None, "groups", None, None)
    by_expert = lambda x: constrain(x, "experts", "dispatched_groups", None, None)

    def product(x, name):
        y = jnp.einsum("egcd,edf->egcf", x, experts.weights[name])
        return constrain(y, "experts", "dispatched_groups", None, experts.axes[name][-1])

    with jax.named_scope("experts"):
        return by_group(by_expert(experts.layer(by_expert(by_group(sent)), product, experts.key)))


def lost(choice: TokenChoice, placement: Placement) -> Float[Array, ""]:
    """How many choices got no place."""
    return ((choice.expert >= 0) & ~placement.kept).sum().astype(jnp.float32)
