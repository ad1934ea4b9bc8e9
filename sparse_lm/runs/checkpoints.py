"""Checkpoints: saved in the background by Orbax, each array with a digest that is checked when it is read.

A checkpoint is a folder named by its step. In it every item (parameters, optimizer, …) is an Orbax folder of its own, a
flat table from names to arrays, so that one item is read without the others; `meta`, in JSON, has the digests and what
the caller adds. A step counts as a checkpoint when Orbax has committed it and `meta` is there, which is why `meta` is
the first to go when one is deleted.
"""

import errno
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sparse_lm.config import digest
from sparse_lm.errors import UserError, one_line
from sparse_lm.paths import in_object_store, user_path
from sparse_lm.runs.digest import digests
from sparse_lm.runs.processes import ask_primary, exchange

META = "meta"
UNFINISHED = r"[0-9]+\.orbax-checkpoint-tmp.*"  # the names of saves that are under way, or were interrupted
Prefixes = tuple[tuple[str, str], ...]  # old and new beginnings of names
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unusable(Exception):
    """What is wrong with a checkpoint, on one line."""


class Checkpoints:
    """The checkpoints in one folder: the `keep` newest, and the one of the lowest loss besides.

    Reading changes nothing in the folder. The first save removes what an interrupted one has left, and, after
    `restore`, the steps newer than the one restored: they can't be used, or the run has gone back behind them.
    Every process calls the same methods in the same order. Once `lost` says why the folder is another's, nothing in it
    is deleted.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 2, schema: int = 1, lost: Callable[[], str] = lambda: ""):
        self.folder = user_path(folder)
        self.keep = keep
        self.schema = schema
        self._lost = lost
        self._writer: ocp.AsyncCheckpointer | None = None
        self._restored: int | None = None
        self._losses: dict[int, float] = {}

    def save(self, step: int, items: dict[str, Any], meta: dict, loss: float | None = None) -> None:
        """Starts to save pytrees of arrays (jax, NumPy) and JSON-able `meta`; returns once the arrays may be donated.

        `loss` is the validation loss at this step, if known. A step that is already there is left as it is. Raises
        `UserError` where the disk is full, also when that has befallen the save before.
        """
        self.wait()
        if self._writer is None:
            self._writer = self._open()
        if step in ask_primary("saved steps", self.steps):
            return
        flat = {item: _flat(tree) for item, tree in items.items()}
        sums = digests({f"{item}/{name}": array for item, arrays in flat.items() for name, array in arrays.items()})
        record = {
            "schema": self.schema,
            "step": step,
            "loss": float(loss) if loss is not None and math.isfinite(loss) else None,
            "arrays": {
                item: {
                    name: [list(a.shape), str(a.dtype), f"{sums[f'{item}/{name}']:016x}"] for name, a in part.items()
                }
                for item, part in flat.items()
            },
            "meta": meta,
        }
        record = json.loads(json.dumps(record))  # as it will be read: lists for tuples, text for keys
        # Orbax can store neither an array without elements nor an item without arrays; the record says all of them.
        stored = {item: {name: a for name, a in arrays.items() if a.size} for item, arrays in flat.items()}
        args = {item: ocp.args.PyTreeSave(arrays) for item, arrays in stored.items() if arrays}
        args[META] = ocp.args.JsonSave(record | {"digest": digest(record)})
        self._needs(sum(a.nbytes for arrays in stored.values() for a in arrays.values()), step)
        try:
            self._writer.save(self.folder / str(step), args=ocp.args.Composite(**args))
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Waits until the save that is under way is complete, and deletes the checkpoints that it replaces."""
        if self._writer is None:
            return
        try:
            self._writer.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        if jax.process_index() == 0 and not self._lost():
            steps = self.steps()
            best = min(steps, key=self._loss, default=None)
            for step in steps[: -self.keep]:
                if step != best or math.isinf(self._loss(step)):
                    self._delete(step)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        found = ocp.path.step.standard_name_format().find_all(self.folder)
        return sorted(m.step for m in found if (m.path / META / "metadata").exists())

    def _incomplete(self) -> list[epath.Path]:
        """Folders with the name of a step that are no checkpoint: half deleted, or not copied whole."""
        steps = self.steps()
        return [path for path in self._listed("[1-9][0-9]*|0") if int(path.name) not in steps]

    def _listed(self, pattern: str) -> list[epath.Path]:
        """What is in the folder under names that a regular expression matches whole; an object store may have none."""
        there = self.folder.iterdir() if self.folder.exists() else ()
        return [path for path in there if re.fullmatch(pattern, path.name)]

    def meta(self, step: int) -> dict:
        """What `save` was given as `meta`. Raises `UserError` for a step that isn't there or can't be read."""
        return self._usable_record(step)["meta"]

    def identify(self, step: int, items: Sequence[str]) -> str:
        """A hash of what the items of a checkpoint hold: of the digests of their arrays, so that none is read.

        Raises `UserError` for a step that isn't there or can't be read.
        """
        saved = self._usable_record(step)["arrays"]
        return digest({item: saved.get(item, {}) for item in items})

    def restore(
        self, items: dict[str, Any], step: int | None = None, old_names: dict[str, Prefixes] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """The step and the named items, from the newest usable checkpoint or from the given one.

        Args:
            items: each described by a pytree of `jax.ShapeDtypeStruct`: a leaf with a sharding becomes a `jax.Array`
                there (on any mesh, whatever the mesh and the number of processes that saved it), one without a NumPy
                array. Items that aren't named aren't read; one without arrays need not be in the checkpoint.
            step: of the checkpoint; by default the newest usable one.
            old_names: by item, how names began in checkpoints of older versions, and how they begin now.

        Raises `UserError` where no checkpoint, or not the given one, can be used, and where the checkpoint's arrays are
        not those described.
        """
        self.wait()
        known = ask_primary("saved steps", self.steps)
        if not known:
            raise UserError(f"there is no complete checkpoint in {self.folder}")
        if step is not None:
            self._check_known(step, known)
        for path in self._incomplete():
            if step is None and int(path.name) > known[-1]:
                self._warn(f"{path} is passed over: it is no complete checkpoint")
        for candidate in reversed(known) if step is None else [step]:
            try:
                restored = self._restore(candidate, items, old_names or {})
            except Unusable as fault:
                text = f"checkpoint {candidate} in {self.folder} can't be used: {fault}"
                if step is not None:
                    raise UserError(text) from fault
                self._warn(f"{text}; trying the one before")
            else:
                self._restored = candidate
                return candidate, restored
        if ask_primary("saved steps", self.steps) != known:  # a trainer has saved and deleted some in the meantime
            return self.restore(items, step, old_names)
        raise UserError(f"none of the checkpoints in {self.folder} can be used: {', '.join(map(str, known))}")

    def close(self) -> None:
        self.wait()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # otherwise what ended the block is what matters
                raise

    def _open(self) -> ocp.AsyncCheckpointer:
        if jax.process_index() == 0 and not self._lost():
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self.steps()
            for path in (*self._listed(UNFINISHED), *self._incomplete()):
                path.rmtree()
            for step in known:
                if self._restored is not None and step > self._restored:
                    self._delete(step)
        exchange("checkpoints are tidy", None)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())

    def _warn(self, text: str) -> None:
        if jax.process_index() == 0:
            print(f"WARNING: {text}", file=sys.stderr, flush=True)

    def _delete(self, step: int) -> None:
        (self.folder / str(step) / META / "metadata").unlink()
        (self.folder / str(step)).rmtree()

    def _loss(self, step: int) -> float:
        """The validation loss at a step, infinite where it isn't known."""
        if step not in self._losses:
            try:
                loss = self._record(step)["loss"]
            except Unusable:
                loss = None
            self._losses[step] = math.inf if loss is None else loss
        return self._losses[step]

    def _needs(self, size: int, step: int) -> None:
        """Raises where a local disk has no room for `size` bytes: said beforehand, nothing has to be undone."""
        if jax.process_index() == 0 and not in_object_store(self.folder):
            free = shutil.disk_usage(self.folder).free
            if free < size:
                raise UserError(
                    f"the disk is full: checkpoint {step} in {self.folder} needs {size / 1e6:.1f} MB, "
                    f"{free / 1e6:.1f} MB are free"
                )

    def _failed(self, error: Exception) -> Exception:
        """What to raise for a failed save, after removing what there is of it."""
        if jax.process_index() == 0 and not self._lost():
            for path in self._listed(UNFINISHED):
                path.rmtree(missing_ok=True)
        code = re.search(r"os_error_code='(\d+)'", str(error))  # TensorStore's way to tell errno
        if (int(code[1]) if code else getattr(error, "errno", None)) in FULL:
            return UserError(f"the disk is full: a checkpoint could not be written to {self.folder}")
        return error

    def _check_known(self, step: int, known: list[int]) -> None:
        if step not in known:
            raise UserError(
                f"there is no checkpoint {step} in {self.folder}; there are: {', '.join(map(str, known)) or 'none'}"
            )

    def _usable_record(self, step: int) -> dict:
        self._check_known(step, self.steps())
        try:
            return self._record(step)
        except Unusable as fault:
            raise UserError(f"checkpoint {step} in {self.folder} can't be used: {fault}") from fault

    def _record(self, step: int) -> dict:
        """What `save` has written as `meta`. Raises `Unusable`, and `UserError` for another schema."""
        try:
            record = dict(ocp.JsonCheckpointHandler().restore(self.folder / str(step) / META))
            intact = record.pop("digest") == digest(record)
        except Exception as error:
            raise Unusable(f"{META} can't be read ({one_line(_root(error))})") from error
        if not intact:
            raise Unusable(f"{META} does not match its digest")
        if record["step"] != step:
            raise Unusable(f"it is a copy of checkpoint {record['step']}")
        if record["schema"] != self.schema:
            raise UserError(
                f"checkpoint {step} in {self.folder} has schema {record['schema']}; this version reads {self.schema}"
            )
        return record

    def _restore(self, step: int, items: dict[str, Any], old_names: dict[str, Prefixes]) -> dict[str, Any]:
        flat = {item: _flat(tree) for item, tree in items.items()}
        arrays: dict[str, dict] = {}
        saved: dict[str, int] = {}
        fault = ""
        try:
            record = self._record(step)
            for item, wanted in flat.items():
                if wanted and item not in record["arrays"]:
                    raise Unusable(f"it has no item {item!r}")
                stored = record["arrays"].get(item, {})
                there = _names_there(wanted, stored, old_names.get(item, ()))
                self._check_same(step, item, wanted, {name: stored[old] for name, old in there.items()})
                loaded = _load(self.folder / str(step) / item, {there[name]: a for name, a in wanted.items()})
                arrays[item] = {name: loaded[there[name]] for name in wanted}
                saved |= {f"{item}/{name}": int(stored[there[name]][2], 16) for name in wanted}
        except Unusable as error:
            fault = str(error)
        if fault := next(filter(None, exchange(f"checkpoint {step} is read", fault)), ""):
            raise Unusable(fault)
        found = digests({f"{item}/{name}": a for item, part in arrays.items() for name, a in part.items()})
        if changed := [name for name in sorted(found) if found[name] != saved[name]]:
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise Unusable(f"array {changed[0]}{more} has changed since it was saved (its digest differs)")
        return {
            item: jax.tree.unflatten(jax.tree.structure(tree), [arrays[item][name] for name in flat[item]])
            for item, tree in items.items()
        }

    def _check_same(self, step: int, item: str, wanted: dict[str, Any], saved: dict[str, list]) -> None:
        where = f"checkpoint {step} in {self.folder}"
        for name in sorted(wanted.keys() ^ saved.keys()):
            raise UserError(f"{where} has {'no' if name in wanted else 'an unexpected'} array {item}/{name}")
        for name, a in wanted.items():
            shape, dtype, _ = saved[name]
            if (tuple(shape), dtype) != (tuple(a.shape), str(a.dtype)):
                raise UserError(f"{where}: array {item}/{name} is {dtype}{shape}, not {a.dtype}{list(a.shape)}")


def _flat(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by name, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) < len(leaves):
        raise ValueError("two arrays have the same name")
    return flat


def _names_there(wanted: Iterable[str], stored: Iterable[str], old_names: Prefixes) -> dict[str, str]:
    """The stored names, by the names that their arrays have now."""

    def now(name: str) -> str:
        renamed = [new + name[len(old) :] for old, new in old_names if name.startswith(old)]
        return next((new for new in renamed if new in wanted and new not in stored), name)

    return {now(name): name for name in stored}


def _load(path: epath.Path, wanted: dict[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
    """Reads one item. No process waits for another here, so that a fault in one does not stop the others."""
    stored = {name: a for name, a in wanted.items() if a.size}
    how = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        if a.sharding is None
        else ocp.ArrayRestoreArgs(sharding=a.sharding, global_shape=a.shape, dtype=a.dtype)
        for name, a in stored.items()
    }
    arrays = {}
    if stored:
        try:
            arrays = ocp.PyTreeCheckpointHandler().restore(
                path, args=ocp.args.PyTreeRestore(item=stored, restore_args=how)
            )
        except Exception as error:
            if isinstance(_root(error), MemoryError | jax.errors.JaxRuntimeError):  # another checkpoint is no help
                raise
            named = [name for name in stored if f"{name}/" in re.findall(r"[\"']([^\"']*/)", str(error))]
            what = f"array {path.name}/{named[0]}" if named else path.name
            raise Unusable(f"{what} can't be read ({one_line(_root(error))})") from error
    for name, a in wanted.items():
        if name not in stored:
            empty = np.zeros(a.shape, a.dtype)
            arrays[name] = empty if a.sharding is None else jax.device_put(empty, a.sharding)
    return arrays


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
