"""What a router says: which token goes to which expert, with which weight."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int


class TokenChoice(NamedTuple):
    """Each token names K experts. An expert of -1 is nobody: padding, or a choice that the router leaves empty."""

    expert: Int[Array, "G S K"]
    weight: Float[Array, "G S K"]


class Routing(NamedTuple):
    """The result of a router.

    choice: who goes where.
    losses: auxiliary losses by name with their coefficients, each summed over the tokens routed, so that sums over
        microbatches, groups and devices add up to the same number however the batch is divided.
    statistics: sums over the tokens routed, from which `health.health` and `Router.update` are computed.
    """

    choice: TokenChoice
    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, jax.Array]
