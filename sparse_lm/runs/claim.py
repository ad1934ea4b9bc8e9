"""One process holds a folder at a time.

On a disk it holds a lock, which the kernel lets go when the process ends, however it ends. An object store has no locks
but writes under a precondition: a claim is an object that its owner writes anew every `RENEWED_EVERY` seconds, each
time on condition that it is the one it wrote last. A claim that stays the same for `LAPSES_AFTER` seconds has no living
owner, and the next process writes its own over it, again on that condition, so that one of several wins. The time is
measured by whoever waits, on its own clock; those of two machines are never compared.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import socket
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorstore as ts
from etils import epath

from sparse_lm.errors import UserError, one_line
from sparse_lm.paths import in_object_store

log = logging.getLogger("sparse_lm")

NAME = ".lock"
RENEWED_EVERY = 30.0  # seconds
LAPSES_AFTER = 180.0  # seconds; the owner itself gives up after half of them, well before another may take over
ANSWERED_WITHIN = 10.0  # seconds, for one read or write


class Lock:
    """A folder on a disk, held for as long as a file in it is open and locked."""

    lost = ""  # as `Claim.lost`: a lock is never lost

    def __init__(self, folder: epath.Path):
        self._path = folder / NAME
        while True:
            self._file = os.open(os.fspath(self._path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(self._file, 300).decode(errors="replace").strip()
                os.close(self._file)
                raise _in_use(folder, holder) from None
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._file)):
                    break
            os.close(self._file)  # its last holder has removed it since it was opened
        os.truncate(self._file, 0)
        os.write(self._file, _this_process().encode())

    def release(self, remove: bool = False) -> None:
        """Lets others hold the folder. remove: leave nothing of the lock in it."""
        if remove:
            self._path.unlink()
        os.close(self._file)


class Found(NamedTuple):
    """The object of a claim as it was read; a generation stands for "there is none" too."""

    generation: bytes
    exists: bool
    holder: str = ""  # empty where the object is damaged
    owner: str = ""  # a name that no other claim has


class Unanswered(Exception):
    """Why an object store did not do what it was asked, on one line."""


class Claim:
    """A folder in an object store, held by an object in it, which a thread renews until `release`."""

    def __init__(
        self,
        folder: str,
        while_waiting: Callable[[], None] = lambda: None,
        renewed_every: float | None = None,
        lapses_after: float | None = None,
        context: ts.Context | None = None,
    ):
        """Waits, where another process has a claim, for it to lapse.

        Args:
            folder: a URL that TensorStore knows: gs://…, s3://….
            while_waiting: as in `hold`.
            renewed_every: seconds; None: `RENEWED_EVERY`.
            lapses_after: seconds, the same in all processes; None: `LAPSES_AFTER`.
            context: TensorStore's, for what is kept in memory.

        Raises `UserError` where the other process lives, and where the store can't be read or written.
        """
        self.folder = folder
        self._renewed_every = RENEWED_EVERY if renewed_every is None else renewed_every
        self._lapses_after = LAPSES_AFTER if lapses_after is None else lapses_after
        self._owner, self._writes = uuid.uuid4().hex, 0
        self._generation = b""
        self._renewed = -math.inf
        self._lost = self._fault = ""
        self._released = threading.Event()
        try:
            self._store = _open(folder, context or ts.Context())
            self._take(while_waiting)
        except Unanswered as error:
            raise UserError(f"{folder} can't be claimed for this process: {error}") from error
        self._thread = threading.Thread(target=self._renew, name=f"claim on {folder}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str:
        """Why the claim is no longer held, on one line; empty while it is. It costs nothing: nobody is asked.

        Another process has the claim, it was deleted, or it could not be renewed for so long that another may soon have
        it.
        """
        silent = _now() - self._renewed
        if not self._lost and silent > self._lapses_after / 2:
            fault = f" ({self._fault})" if self._fault else ""
            self._lost = f"{self.folder} is no longer held: its claim was not renewed for {silent:.0f} s{fault}"
        return self._lost

    def release(self, remove: bool = False) -> None:
        """Lets others hold the folder: deletes the claim if it is still this one. Nothing of it is left."""
        self._released.set()
        self._thread.join()
        self._renewed = math.inf
        try:
            if not self._delete() and (found := self._read()).owner == self._owner:
                self._generation = found.generation
                self._delete()
        except Unanswered as error:
            log.warning("%s stays claimed for %.0f s more: %s", self.folder, self._lapses_after, error)

    def _take(self, while_waiting: Callable[[], None]) -> None:
        found = self._read()
        if found.exists:
            before, found = found, self._watch(found, while_waiting)
            if found.exists and found.generation != before.generation:
                raise _in_use(self.folder, found.holder)
        if not self._write(found.generation):
            raise _in_use(self.folder, self._read().holder)

    def _watch(self, found: Found, while_waiting: Callable[[], None]) -> Found:
        """The claim as soon as it is not what was found, or as it was found once it has lapsed."""
        holder = found.holder or "another process"
        log.warning(
            "%s is held by %s; waiting at most %.0f s for its claim to lapse", self.folder, holder, self._lapses_after
        )
        until = _now() + self._lapses_after
        while (left := until - _now()) > 0:
            while_waiting()
            time.sleep(min(1.0, self._renewed_every / 3, left))
            with contextlib.suppress(Unanswered):  # whatever it has missed, the write that follows has a condition
                if (now := self._read()).generation != found.generation:
                    return now
        return found

    def _renew(self) -> None:
        wait = self._renewed_every
        while not self._released.wait(wait) and not self.lost:
            try:
                if not self._write(self._generation):
                    found = self._read()
                    taken = f"{found.holder or 'another process'} has taken it over"
                    self._lost = f"{self.folder} is no longer held: {taken if found.exists else 'its claim is gone'}"
                wait = self._renewed_every
            except Unanswered as error:
                self._fault = str(error)
                wait = self._renewed_every / 6

    def _read(self) -> Found:
        read = _answer(self._store.read(NAME))
        generation, exists = read.stamp.generation, read.state == "value"
        try:
            value = json.loads(read.value)
            return Found(generation, exists, " ".join(value["holder"].split())[:300], str(value["owner"]))
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or not what `_write` writes
            return Found(generation, exists)

    def _write(self, generation: bytes) -> bool:
        """Writes the claim over what has this generation; False where that is no longer there."""
        begun = _now()
        self._writes += 1  # in the object, for stores whose generation is a digest of the content
        value = {"holder": _this_process(), "owner": self._owner, "writes": self._writes}
        stamp = _answer(self._store.write(NAME, json.dumps(value), if_equal=generation))
        if stamp.generation:
            self._generation, self._renewed = stamp.generation, begun
            return True
        # A write whose answer was lost, or waited for in vain, may have been done after all.
        found = self._read()
        return found.owner == self._owner and self._write(found.generation)

    def _delete(self) -> bool:
        return bool(_answer(self._store.write(NAME, None, if_equal=self._generation)).generation)


Hold = Lock | Claim  # of a folder, by this process, until `release`


def hold_folder(folder: epath.Path, while_waiting: Callable[[], None] = lambda: None) -> Hold:
    """Holds a folder that exists, on a disk or in an object store.

    Args:
        folder: where.
        while_waiting: called about every second while the claim of another process is watched, which takes up to
            `LAPSES_AFTER` seconds. What it raises ends the waiting.

    Raises `UserError` where a living process holds the folder, or the object store can't be written.
    """
    return Claim(str(folder), while_waiting) if in_object_store(folder) else Lock(folder)


def _now() -> float:
    """Seconds that go on while the machine is suspended: a claim lapses then too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _open(folder: str, context: ts.Context) -> ts.KvStore:
    scheme, _, rest = folder.rstrip("/").partition("://")
    try:
        opened = ts.KvStore.open(f"{scheme}://{urllib.parse.quote(rest)}/", context=context)
    except ValueError as error:  # a kind of store that it does not know
        raise Unanswered(one_line(error)) from error
    return _answer(opened)


def _answer(future: ts.Future) -> Any:
    """What the store answers. Raises `Unanswered`."""
    try:
        return future.result(timeout=ANSWERED_WITHIN)
    except TimeoutError as error:
        future.cancel()
        raise Unanswered(f"no answer within {ANSWERED_WITHIN:g} s") from error
    except Exception as error:
        raise Unanswered(one_line(error)) from error


def _in_use(folder: epath.Path | str, holder: str) -> UserError:
    holder = holder or "another process"
    return UserError(f"{folder} is in use by {holder}; wait for it, end it, or choose another --workdir")


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
