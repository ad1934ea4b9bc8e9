"""Anticipatory routing: experts chosen by the parameters of some steps before (DeepSeek-V4 2026, section 4.2.3).

In step t features, combine weights and gradients are of the parameters θ_t, and the choice of experts is of θ_{t-Δ}: so
routing and features do not drive each other from one step to the next. No older parameters are kept for that. Step t-Δ
has the batch of step t as well, runs a forward pass of it, and puts what its routers choose in a queue. That pass has
the randomness of step t, so that parameters which stay as they are choose what they would have chosen in step t.

It is switched on by a spike of the loss, for the steps after it, and off a number of steps after the last spike. In its
first Δ steps the queue fills, and routers still choose for themselves. While it is off, nothing is computed ahead. The
report goes back some steps first when a loss spikes, which is not done here: the run goes on from where it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.errors import UserError
from sparse_lm.mesh import sharding
from sparse_lm.routing import Replay, SoftSlots, router_of

AHEAD = "ahead"  # the item of a step's batch that is the batch of Δ steps later
DECAY = 0.9  # of the running mean of the loss, per step: one that lags behind a falling loss hides a spike


class Anticipation(NamedTuple):
    """What it keeps from step to step.

    The choices for step t are in the queue's place t mod Δ, by microbatch and expert layer: [G, S, K], or [G, E, C]
    where experts choose. They take 4 bytes each, divided over the devices as the tokens are.
    """

    queue: Int[Array, "Δ parts n G X Y"]
    step: Int[Array, "Δ"]  # the step that each place of the queue is for
    mean: Float[Array, ""]  # running mean of the cross-entropy, nats per token; infinite before the first step
    left: Int[Array, ""]  # steps that it is still on


def steps_ahead(config: configs.Config) -> int:
    """Δ: `training.anticipation.ahead`, and 0 in a dense model. Raises `UserError` for a router that chooses nobody."""
    ahead, router = config.training.anticipation.ahead, config.model.router.name
    if not config.model.experts:
        return 0
    if ahead and router_of(config.model).form is SoftSlots:
        raise UserError(
            f"training.anticipation.ahead is {ahead}; it must be 0 with the router {router!r}, which mixes tokens and "
            "makes no choice that could be made ahead"
        )
    return ahead


def init(ahead: int, choices: jax.ShapeDtypeStruct) -> Anticipation:
    """The beginning, off. choices: what the routers choose in a step, [parts, n, G, S, K] or [parts, n, G, E, C]."""
    return Anticipation(
        queue=jnp.full((ahead, *choices.shape), -1, choices.dtype),
        step=jnp.full(ahead, -1, jnp.int32),
        mean=jnp.array(jnp.inf, jnp.float32),
        left=jnp.zeros((), jnp.int32),
    )


def with_sharding(abstract: Anticipation, mesh: jax.sharding.Mesh) -> Anticipation:
    """The abstract state with the queue divided over the mesh as the routing groups are."""
    place = sharding(mesh, None, None, None, "groups")
    queue = jax.ShapeDtypeStruct(abstract.queue.shape, abstract.queue.dtype, sharding=place)
    return abstract._replace(queue=queue)


def queued_choices(state: Anticipation, step: Int[Array, ""]) -> Replay:
    """The choices made ahead for a step, to be taken if it is on and there are any; one for each part and layer."""
    place = step % len(state.queue)
    queued = state.queue[place]
    return Replay(queued, jnp.broadcast_to((state.left > 0) & (state.step[place] == step), queued.shape[:2]))


def update(
    state: Anticipation,
    options: configs.Anticipation,
    step: Int[Array, ""],
    loss: Float[Array, ""],
    choose: Callable[[], Int[Array, "parts n G X Y"]],
) -> Anticipation:
    """The state after a step.

    loss: the step's mean cross-entropy; a spike where it is more than `options.spike` above the running mean, or not
    finite, and then it does not enter the mean. choose: makes the choices for the step Δ later; called while it is on.
    """
    ahead = len(state.queue)
    place, on = step % ahead, state.left > 0
    queued = state.queue[place]
    made = jax.lax.cond(on, choose, lambda: queued)
    finite = jnp.isfinite(loss)
    mean = jnp.where(jnp.isinf(state.mean), loss, DECAY * state.mean + (1 - DECAY) * loss)
    spike = ~finite | (loss > state.mean + options.spike)
    return Anticipation(
        queue=state.queue.at[place].set(made),
        step=state.step.at[place].set(jnp.where(on, step + ahead, state.step[place])),
        mean=jnp.where(finite, mean, state.mean),
        left=jnp.where(spike, options.steps, jnp.maximum(state.left - 1, 0)),
    )


def step_batch(
    config: configs.Config, batches: data.Batches, step: int, place: jax.sharding.NamedSharding
) -> dict[str, Any]:
    """What a step (0, 1, …) is given: its batch, and under `AHEAD` the one of Δ steps later where choices are made
    ahead; beyond the end of the data the last one, whose choices come to no use."""
    batch = lambda number: data.device_batch(batches, number, config.training.batch, place)
    if not (ahead := steps_ahead(config)):
        return batch(step)
    return batch(step) | {AHEAD: batch(min(step + ahead, len(batches) - 1))}
