"""What a router says: who goes where, with which weight. It takes one of three forms."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenChoice(NamedTuple):
    """Each token names K experts, none of them twice. An expert of -1 is nobody: padding, or a choice that the router
    leaves empty.

    priority: tokens of higher priority take their places first, None: earlier tokens do (Riquelme et al. 2021).
    """

    expert: Int[Array, "G S K"]
    weight: Float[Array, "G S K"]
    priority: Float[Array, "G S"] | None = None


class ExpertChoice(NamedTuple):
    """Each expert names C tokens of each group. A token of -1 is nobody: an empty place."""

    token: Int[Array, "G E C"]
    weight: Float[Array, "G E C"]


class SoftSlots(NamedTuple):
    """Each of an expert's C slots takes a mixture of a group's tokens, and each token a mixture of the slots' outputs.

    dispatch: the share of each token in a slot. combine: the share of each slot in a token's output.
    """

    dispatch: Float[Array, "G S E C"]
    combine: Float[Array, "G S E C"]


Choice = TokenChoice | ExpertChoice | SoftSlots


def chosen_indices(choice: Choice) -> jax.Array | None:
    """What of a choice is recorded and can be replayed: the indices; None where there are none."""
    match choice:
        case TokenChoice():
            return choice.expert
        case ExpertChoice():
            return choice.token
    return None


class Replay(NamedTuple):
    """Choices, as `chosen_indices` records them, to be replayed only while `on`."""

    indices: Int[Array, "G X Y"]
    on: Bool[Array, ""]


class Routing(NamedTuple):
    """The result of a router.

    choice: who goes where.
    losses: auxiliary losses by name with their coefficients, each summed over the tokens routed, so that sums over
        microbatches, groups and devices add up to the same number however the batch is divided.
    statistics: sums over the tokens routed, from which `health.health` and `Router.update` are computed.
    """

    choice: Choice
    losses: dict[str, Float[Array, ""]]
    statistics: dict[str, jax.Array]


def indices_to_replay(replay: jax.Array | Replay | None, route: Callable[[], Routing]) -> jax.Array | None:
    """The indices that a router is to take: those to replay, or while they are off those of its own `route`."""
    if not isinstance(replay, Replay):
        return replay
    return jnp.where(replay.on, replay.indices, chosen_indices(route().choice))
