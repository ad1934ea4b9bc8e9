"""Files and folders that are complete or do not exist, each made by one process at a time."""

import contextlib
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator

from etils import epath

log = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(final: epath.Path) -> Iterator[epath.Path]:
    """Yields a path beside `final` to write to, which is renamed to `final` at the end and removed after an error."""
    host = socket.gethostname()
    for leftover in final.parent.glob(f".{final.name}.{host}.*"):  # of a killed process: this one holds the lock
        _remove(leftover)
    path = final.parent / f".{final.name}.{host}.{uuid.uuid4().hex}"
    try:
        yield path
        try:
            os.replace(path, final)
        except OSError:
            if not final.exists():
                raise  # otherwise another process was first, and wrote the same
    finally:
        _remove(path)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    elif path.exists():
        path.unlink()


@contextlib.contextmanager
def file_lock(path: epath.Path) -> Iterator[None]:
    """Holds a lock, for which other processes wait. Does nothing on a file system without locks."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing the same text; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.info("%s is on a file system without locks", path)
        yield
