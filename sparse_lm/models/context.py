"""What every layer of a forward pass is given alike, and what a routed layer reports."""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


class Context(NamedTuple):
    """What every layer of a forward pass is given alike.

    Each kind of attention makes its own mask of it, and each has caches of its own.
    """

    ids: Int[Array, "B L"]
    segments: Int[Array, "B L"]  # the document of each token in its row; 0 for padding
    positions: Int[Array, "B L"]  # within the document
    capacity_factor: float  # inf: dropless
    cache_start: Int[Array, "B"] | None = None  # the place in its caches at which each row writes; None: no caches
    alone: bool = False  # each token is routed without looking at others, as generation must

    @property
    def valid(self) -> Bool[Array, "B L"]:
        """False for padding."""
        return self.segments > 0


class Aux(NamedTuple):
    """What a routed layer reports beside its output; other layers report None."""

    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, jax.Array]
    chosen: Any  # what `routing.chosen_indices` says; a forward pass can replay it
