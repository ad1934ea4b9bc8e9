"""A training state as the items of a checkpoint, and back."""

import functools
from typing import Any

import jax

from sparse_lm.errors import UserError
from sparse_lm.training.build import Build, TrainState
from sparse_lm.training.checkpoints import Checkpoints
from sparse_lm.training.layout import abstract_slices, stack, unstack
from sparse_lm.training.run_folder import read_config

POSITION = ("seed", "step", "tokens", "skipped", "skipped_in_a_row")  # the counters of a TrainState


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
    model = program.config.model
    return {item: abstract_slices(model, part) for item, part in _parts(program.abstract_state).items()}


@functools.lru_cache(maxsize=2)
def _cut(program: Build):
    model = program.config.model
    places = jax.tree.map(lambda leaf: leaf.sharding, _abstract(program))
    return jax.jit(
        lambda state: {item: unstack(model, part) for item, part in _parts(state).items()}, out_shardings=places
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
    _, found = checkpoints.restore(wanted, step)
    parts = _parts(program.abstract_state)
    return {item: stack(program.config.model, found[item], parts[item]) for item in wanted}


def restore_state(program: Build, checkpoints: Checkpoints, step: int | None = None) -> TrainState:
    items = restore(program, checkpoints, step)
    return TrainState(**items.pop("position"), **items)


def initial_state(program: Build, run: str = "") -> TrainState:
    """The state of step 0, with the parameters and router state of another run (RUN@STEP) where one is named."""
    state = program.init()
    if not run:
        return state
    path, _, step = run.rpartition("@")
    with Checkpoints(f"{path}/checkpoints") as checkpoints:
        items = restore(program, checkpoints, int(step), only=("parameters", "router"))
    return state._replace(**items)


def saved_run(run: str) -> str:
    """RUN or RUN@STEP as an absolute path and a saved step, by default the newest: what it means stays the same."""
    path, _, step = run.rpartition("@") if run.rpartition("@")[2].isdigit() else (run, "", "")
    read_config(path)
    with Checkpoints(f"{path}/checkpoints") as checkpoints:
        saved = checkpoints.steps()
        folder = checkpoints.folder.parent
    if not saved or (step and int(step) not in saved):
        has = f"it has saved steps {', '.join(map(str, saved))}" if saved else "it has no saved step"
        raise UserError(f"--init-from={run} can't be used: {has}")
    return f"{folder}@{step or saved[-1]}"
