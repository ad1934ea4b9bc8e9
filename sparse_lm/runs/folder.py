"""The folder of a run: config.json, metrics.jsonl, eval.jsonl, evaluation_rows.npz, summary.json, and checkpoints/.

One living process writes to it. Whole files are written under another name and renamed. What grows is a line of JSON
per row; where a file can't grow (object stores), rows are collected and written in parts, `metrics-00000120.jsonl` from
the 120th row on. Both are read in the same way.
"""

import contextlib
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from sparse_lm.config import Config, from_dict, identity_fields, resolve, to_dict
from sparse_lm.errors import UserError
from sparse_lm.paths import in_object_store, user_path
from sparse_lm.runs.claim import NAME, Hold, hold_folder

PART = 100  # rows
EVALUATION_ROWS = "evaluation_rows.npz"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # one of them


class RunFolder:
    """A run's folder, held by this process until `close`. Only the primary process writes.

    As a context it removes a folder that it has made when an exception comes before the first row or checkpoint.
    """

    def __init__(
        self,
        path: epath.PathLike,
        config: Config,
        info: dict,
        primary: bool = True,
        while_waiting: Callable[[], None] = lambda: None,
    ):
        """Makes the folder, or opens the run in it, whose config stays as it is until `rewind` goes on with it.

        Args:
            path: the folder.
            config: resolved.
            info: what else config.json holds: versions, devices, `fingerprint`, …
            primary: whether this is the process that writes.
            while_waiting: called about every second while it is not known yet whether the process that held a folder in
                an object store lives, which takes up to `claim.LAPSES_AFTER` seconds. What it raises ends the waiting.

        Raises `UserError` where another living process holds the folder, or it holds a run of another identity
        (`sparse_lm.config.identity_fields`) or on other data.
        """
        self.path = user_path(path)
        self.primary = primary
        self._hold: Hold | None = None
        self._tables: dict[str, Table] = {}
        if not primary:
            self.continued = self._has_run()
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} can't be made a run's folder: {error.strerror}") from error
        self._check_links()
        self._hold = hold_folder(self.path, while_waiting)
        try:
            self.continued = self._has_run()  # False: a new run
            self._description = _dump({"config": to_dict(config), **info})
            if self.continued:
                self._check_same(config, info)
            else:
                self._check_new()
                write_whole(self.path / "config.json", self._description)
        except BaseException:
            self.close()
            raise

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def lost(self) -> str:
        """Why this process no longer holds the folder, on one line; empty while it does. To be asked often."""
        return self._hold.lost if self._hold is not None else ""

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row with a `step` to the table (`metrics` or `eval`); what is not finite becomes null."""
        if self.primary:
            self._table(name).append(row)

    def flush(self) -> None:
        """Makes sure that all rows are stored; to be called before a checkpoint is."""
        for table in self._tables.values():
            table.flush()

    def rewind(self, step: int) -> None:
        """Goes on just after `step`: the config is stored, later rows and the summary are removed, and what a kill has
        left of a row."""
        if self.primary:
            write_whole(self.path / "config.json", self._description)
            for name in ("summary.json", EVALUATION_ROWS):
                (self.path / name).unlink(missing_ok=True)
            for name in ("metrics", "eval"):
                self._table(name).rewind(step)

    def keep(self, name: str, content: bytes) -> None:
        """Stores a small file, whole or not at all."""
        write_whole(self.path / name, content)

    def rows(self, name: str) -> list[dict[str, Any]]:
        self.flush()
        return read_rows(self.path, name)

    def finish(self, summary: dict[str, Any], evaluated: dict[str, dict[str, np.ndarray]]) -> None:
        """Writes evaluation_rows.npz and summary.json, which marks a run as finished.

        Args:
            summary: of the run.
            evaluated: what was measured of each row, by split and name.
        """
        if self.primary:
            self.flush()
            arrays = {f"{split}/{name}": array for split, rows in evaluated.items() for name, array in rows.items()}
            np.savez_compressed(file := io.BytesIO(), **arrays)
            write_whole(self.path / EVALUATION_ROWS, file.getvalue())
            write_whole(self.path / "summary.json", _dump(_plain(summary)))

    def summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, otherwise None."""
        return read_summary(self.path)

    def close(self) -> None:
        try:
            for table in self._tables.values():
                table.close(flush=not self.lost)  # a folder that is lost is another's to write to
            self._tables.clear()
        finally:
            self._release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None and self.primary and not self.continued and not self.lost:
            made = {path.name for path in self.path.iterdir()}
            if made <= {"config.json", *TOKENIZERS, NAME}:  # nothing has come of it
                for name in made - {NAME}:
                    (self.path / name).unlink(missing_ok=True)
                self._release(remove=True)
                with contextlib.suppress(OSError):  # an object store has no empty folders, and another may be in it
                    self.path.rmdir()
        self.close()

    def _has_run(self) -> bool:
        return (self.path / "config.json").exists()

    def _check_links(self) -> None:
        """Raises `UserError` for a file that leads elsewhere: what is written to it would not stay in the folder."""
        for path in [] if in_object_store(self.path) else sorted(self.path.iterdir()):
            if os.path.islink(path) and path.name != "checkpoints":
                raise UserError(f"{path} is a symbolic link; a run writes to files of its own folder alone")

    def _check_new(self) -> None:
        """Raises `UserError` where the folder has parts of a run, but no config that says which."""
        parts = r"checkpoints|summary\.json|(metrics|eval)(-\d+)?\.jsonl"
        if left := sorted(path.name for path in self.path.glob("*") if re.fullmatch(parts, path.name)):
            gone = f"{self.path} has {left[0]} of a run whose config.json is gone"
            raise UserError(f"{gone}; bring that back, or choose another --workdir")

    def _release(self, remove: bool = False) -> None:
        if self._hold is not None:
            self._hold.release(remove)
            self._hold = None

    def _table(self, name: str) -> "Table":
        return self._tables.setdefault(name, Table(self.path, name))

    def _check_same(self, config: Config, info: dict) -> None:
        there, here = identity_fields(read_config(self.path)), identity_fields(config)
        value = lambda side, key: repr(side[key]) if key in side else "unset"
        if differ := [key for key in sorted(here | there) if value(there, key) != value(here, key)]:
            shown = ", ".join(f"{key} is {value(there, key)} there and {value(here, key)} here" for key in differ[:6])
            more = f", and {len(differ) - 6} more" if len(differ) > 6 else ""
            raise UserError(f"{self.path} holds a run of another kind: {shown}{more}; choose another --workdir")
        there, here = (i.get("fingerprint") for i in (_read(self.path / "config.json"), info))
        if there != here:
            raise UserError(
                f"{self.path} holds a run on other data (its fingerprint is {there} there and {here} here); "
                "choose another --workdir, or bring the data back"
            )


class Table:
    """Rows that grow, in `name.jsonl`, or in parts."""

    def __init__(self, folder: epath.Path, name: str, parts: bool | None = None):
        self.folder, self.name = folder, name
        self.parts = in_object_store(folder) if parts is None else parts
        self._file = None
        self._waiting: list[str] = []
        self._stored = len(read_rows(folder, name)) if self.parts else 0

    def append(self, row: dict[str, Any]) -> None:
        line = json.dumps(_plain(row), allow_nan=False) + "\n"
        if self.parts:
            self._waiting.append(line)
            if len(self._waiting) >= PART:
                self.flush()
        else:
            if self._file is None:
                self._file = (self.folder / f"{self.name}.jsonl").open("a")
            self._file.write(line)
            self._file.flush()

    def flush(self) -> None:
        if self._waiting:
            write_whole(self.folder / f"{self.name}-{self._stored:08d}.jsonl", "".join(self._waiting))
            self._stored += len(self._waiting)
            self._waiting.clear()

    def rewind(self, step: int) -> None:
        """Removes the rows after `step`, those that aren't stored yet too."""
        self.close()
        for path in _files(self.folder, self.name):
            text = _read_text(path)
            kept = "".join(json.dumps(row) + "\n" for row in _parse(path, text) if row["step"] <= step)
            if not kept:
                path.unlink()
            elif kept != text:
                write_whole(path, kept)
        self._stored = len(read_rows(self.folder, self.name)) if self.parts else 0

    def close(self, flush: bool = True) -> None:
        if flush:
            self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


def read_config(path: epath.PathLike) -> Config:
    """The resolved config of the run in a folder. Raises `UserError` where there is none."""
    info = read_info(path)
    versions = info.get("versions")
    written_by = versions.get("sparse_lm", "") if isinstance(versions, dict) else ""
    return resolve(from_dict(info.get("config"), f"{path}/config.json", written_by))


def read_info(path: epath.PathLike) -> dict[str, Any]:
    """All that config.json holds for the run in a folder. Raises `UserError` where there is none."""
    file = user_path(path) / "config.json"
    if not file.exists():
        what = "it has no config.json" if file.parent.exists() else "it does not exist"
        raise UserError(f"there is no run in {path}: {what}")
    return _read(file)


def read_rows(path: epath.PathLike, name: str) -> list[dict[str, Any]]:
    """The rows of `metrics` or `eval` in a run's folder, without a last line that is not whole yet."""
    return [row for file in _files(user_path(path), name) for row in _parse(file, _read_text(file))]


def read_summary(path: epath.PathLike) -> dict[str, Any] | None:
    """The summary of the finished run in a folder, None where it isn't finished."""
    file = user_path(path) / "summary.json"
    return _read(file) if file.exists() else None


def read_evaluation_rows(path: epath.PathLike) -> dict[str, dict[str, np.ndarray]]:
    """What was measured of each row (`measures.evaluate_rows`) when the run in a folder had ended.

    Returns arrays by split and name; nothing for a run of version 0.2 or before. Raises `UserError` for a damaged file.
    """
    file, evaluated = user_path(path) / EVALUATION_ROWS, {}
    if not file.exists():
        return evaluated
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            for key in arrays.files:
                split, name = key.split("/")
                evaluated.setdefault(split, {})[name] = arrays[key]
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file} is damaged: {error}") from error
    return evaluated


def _files(folder: epath.Path, name: str) -> list[epath.Path]:
    whole = folder / f"{name}.jsonl"
    return ([whole] if whole.exists() else []) + sorted(folder.glob(f"{name}-*.jsonl"))


def _parse(path: epath.Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise UserError(f"{path}, line {number}, is no row of figures: it has no whole number as its step")
        rows.append(row)
    return rows


def write_whole(path: epath.Path, content: str | bytes) -> None:
    """The whole file or nothing; an object store does that by itself."""
    content = content.encode() if isinstance(content, str) else content
    if in_object_store(path):
        path.write_bytes(content)
        return
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}") from error


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        values = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}; it must hold an object")
    return values


def _dump(values: dict) -> str:
    """JSON, with infinity (a capacity factor) as 1e999: valid, and read back as infinity."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    return re.sub(r"(?<= )(-?)Infinity(?=,?$)", r"\g<1>1e999", text, flags=re.MULTILINE) + "\n"


def _plain(value: Any) -> Any:
    """Numbers of any library as Python's; null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
