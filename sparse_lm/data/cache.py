"""Files and folders that are whole or not there, made by one process at a time."""

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
    """A path beside `final` to write to, renamed to it at the end and removed after an error."""
    host = socket.gethostname()
    for left in final.parent.glob(f".{final.name}.{host}.*"):  # by a process that was killed: we hold the lock
        _remove(left)
    path = final.parent / f".{final.name}.{host}.{uuid.uuid4().hex}"
    try:
        yield path
        try:
            os.replace(path, final)
        except OSError:
            if not final.exists():
                raise  # otherwise another process was first, with the same content
    finally:
        _remove(path)


def _remove(path: epath.Path) -> None:
    if path.is_dir():
        path.rmtree()
    elif path.exists():
        path.unlink()


@contextlib.contextmanager
def file_lock(path: epath.Path) -> Iterator[None]:
    """One process of a machine (or of a file system with locks) at a time; elsewhere the first to rename is taken."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process is preparing the same text; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.info("%s is on a file system without locks", path)
        yield
