"""A training state as the items of a checkpoint, and back."""

import functools
from typing import Any

import jax

from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.step.build import Build
from sparse_lm.step.layout import abstract_slices, slice_layers, stack_layers
from sparse_lm.step.state import TrainState

POSITION = ("seed", "step", "tokens", "skipped", "skipped_in_a_row")  # the counters of a TrainState
# How names began in checkpoints of older versions, and how they begin now. In 0.1.0 the optimizer's first part clipped.
OLD_NAMES = {"optimizer": (("1/", "0/"),)}


def _parts(state: TrainState) -> dict[str, Any]:
    position = {name: getattr(state, name) for name in POSITION}
    return {
        "parameters": state.parameters,
        "optimizer": state.optimizer,
        "router": state.router,
        "anticipation": state.anticipation,
        "position": position,
    }


def _abstract(program: Build) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    stack = program.functional.stack
    return {item: abstract_slices(stack, part) for item, part in _parts(program.abstract_state).items()}


@functools.lru_cache(maxsize=2)
def _cut(program: Build):
    stack = program.functional.stack
    places = jax.tree.map(lambda leaf: leaf.sharding, _abstract(program))
    return jax.jit(
        lambda state: {item: slice_layers(stack, part) for item, part in _parts(state).items()}, out_shardings=places
    )


def snapshot(program: Build, state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """parameters, optimizer, router and position, each a dict of arrays by logical name (see `layout`)."""
    return _cut(program)(state)


def restore(
    program: Build, checkpoints: Checkpoints, step: int | None = None, only: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The items of a checkpoint, by default all of the newest usable one, as they stand in a `TrainState`.

    The arrays are laid out as `program` wants them, whatever mesh they were saved from. Raises `UserError`.
    """
    wanted = {item: part for item, part in _abstract(program).items() if not only or item in only}
    _, found = checkpoints.restore(wanted, step, OLD_NAMES)
    parts = _parts(program.abstract_state)
    return {item: stack_layers(program.functional.stack, found[item], parts[item]) for item in wanted}


def restore_state(program: Build, checkpoints: Checkpoints, step: int | None = None) -> TrainState:
    items = restore(program, checkpoints, step)
    return TrainState(**items.pop("position"), **items)
