"""What a run begins from: random parameters, or those of another run, its parent. A parent is read once."""

import os
import re
from typing import NamedTuple

from etils import epath

from sparse_lm.errors import UserError
from sparse_lm.paths import in_object_store, user_path
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.folder import read_info
from sparse_lm.runs.snapshot import restore
from sparse_lm.step.build import Build
from sparse_lm.step.state import TrainState

ITEMS = ("parameters", "router")  # what a run takes from its parent


class Parent(NamedTuple):
    run: str = ""  # PATH@STEP, absolute; "": parameters are random
    digest: str = ""  # of the parent's parameters and router state; "" where versions up to 0.2.0 made the run

    @property
    def path(self) -> str:
        return self.run.rpartition("@")[0]

    @property
    def step(self) -> int:
        return int(self.run.rpartition("@")[2])


def stored_parent(path: epath.PathLike) -> Parent:
    """What the run in a folder began from."""
    info = read_info(path)
    return Parent(info.get("init_from", ""), info.get("init_from_digest", ""))


def find_parent(workdir: epath.PathLike, asked: str) -> Parent:
    """What the run in a folder begins, or began, from.

    A run with a checkpoint of its own does not need its parent any more, which may be gone, or elsewhere. That another
    one is asked for is then noticed by what is still there: by the digest of its parameters; for a run of a version
    before digests were stored, and where that checkpoint is gone, by the place, if both are places of runs.

    Args:
        workdir: the run's folder, which need not exist yet.
        asked: RUN or RUN@STEP, by default the newest saved step; "": what the run began from, if it exists.

    Raises `UserError` where the parent is needed and can't be used, and where another is asked for.
    """
    if not (user_path(workdir) / "config.json").exists():
        return _read_parent(asked) if asked else Parent()
    parent = stored_parent(workdir)
    if asked:
        parent = _compare(workdir, parent, asked)
    if parent.run and not _saved_steps(workdir):
        return _read_again(parent, f"{workdir}, which has no checkpoint of its own yet,")
    return parent


def initial_state(program: Build, parent: Parent, what: str = "the run") -> TrainState:
    """The state of step 0, with the parent's parameters and router state where there is one.

    what: needs it, for the message. Raises `UserError` where the parent is gone, or not what it was.
    """
    state = program.init()
    if not parent.run:
        return state
    parent = _read_again(parent, what)
    with Checkpoints(f"{parent.path}/checkpoints") as checkpoints:
        return state._replace(**restore(program, checkpoints, parent.step, only=ITEMS))


def _compare(workdir: epath.PathLike, stored: Parent, asked: str) -> Parent:
    """The parent that is asked for where it is known to be the stored one, otherwise the stored one."""
    other = f"{workdir} holds a run that began from {stored.run or 'no other run'}, not from {asked}"
    if not stored.run:
        raise UserError(other)
    path, step = _split(asked)
    if step not in (None, stored.step):
        raise UserError(other)
    try:
        found = _read_parent(f"{path}@{stored.step}")
    except UserError:
        found = None
    if found and stored.digest:
        if found.digest == stored.digest:
            return found
        raise UserError(f"{other} as it is now; without --init-from it goes on")
    if _is_run(path) and _is_run(stored.path) and _real(path) != _real(stored.path):
        raise UserError(other)
    if found and not _is_run(stored.path) and not _saved_steps(workdir):
        return found  # it has been moved, as far as can be told, and is needed
    return stored


def _read_again(parent: Parent, what: str) -> Parent:
    try:
        found = _read_parent(parent.run)
    except UserError as error:
        raise UserError(f"{what} begins from {parent.run}, which can't be used: {error}") from error
    if parent.digest not in ("", found.digest):
        raise UserError(f"{what} begins from {parent.run}, whose parameters are not those that were there")
    return found


def _read_parent(run: str) -> Parent:
    """RUN or RUN@STEP with an absolute path and a saved step, by default the newest: what it means stays the same."""
    path, step = _split(run)
    read_info(path)
    saved = _saved_steps(path)
    if not saved or step not in (None, *saved):
        has = f"it has saved steps {', '.join(map(str, saved))}" if saved else "it has saved no step"
        raise UserError(f"a run can't begin from {run}: {has}")
    step = saved[-1] if step is None else step
    return Parent(f"{path}@{step}", Checkpoints(f"{path}/checkpoints").identify(step, ITEMS))


def _saved_steps(path: epath.PathLike) -> list[int]:
    return Checkpoints(f"{path}/checkpoints").steps()


def _is_run(path: str) -> bool:
    return (user_path(path) / "config.json").exists()


def _real(path: str) -> str:
    return path if in_object_store(path) else os.path.realpath(path)


def _split(run: str) -> tuple[str, int | None]:
    path, _, step = run.rpartition("@")
    path, step = (path, int(step)) if re.fullmatch("[0-9]{1,10}", step) else (run, None)
    return str(user_path(path)), step
