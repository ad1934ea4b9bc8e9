"""The one training loop. What happens beside the steps is plugged in as (every, action) pairs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from sparse_lm.step.state import TrainState


class Moment(NamedTuple):
    """What an action sees, after a step: steps done, the new state, the step's metrics still on the device."""

    step: int
    state: TrainState
    metrics: dict[str, Any]
    last: bool


Action = Callable[[Moment], None]


def loop(
    step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    state: TrainState,
    batches: Iterator[dict],
    start: int,
    stop: int,
    actions: Sequence[tuple[int, Action]],
    beat: Callable[[str], None] = lambda what: None,
) -> TrainState:
    """Steps start to stop - 1 (start steps are done already), then the state.

    Each action is called after every `every`-th step and after the last. They are called in order, so that one that
    ends the run by an exception comes last. beat: told what the loop is about to do, for a watchdog.
    """
    for done in range(start + 1, stop + 1):
        beat(f"waiting for the batch of step {done}")
        batch = next(batches)
        beat(f"in step {done}")
        state, metrics = step(state, batch)
        for every, action in actions:
            if done % every == 0 or done == stop:
                action(Moment(done, state, metrics, done == stop))
    return state
