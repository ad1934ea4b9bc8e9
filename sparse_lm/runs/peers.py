"""Ends a process soon after another one of its run has failed or died, with one line that says why.

A process whose peer is gone would wait for it in a collective, for minutes or for ever. So each writes every few
seconds that it lives, to the coordination service of `jax.distributed`, or why it leaves, and reads what others write.
Where process 0 dies, which holds that service, jax itself aborts the others at once.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from sparse_lm.errors import RunFailed, one_line

EVERY = 2.0  # seconds between two signs of life
DEAD_AFTER = 90.0  # seconds without one; jax itself gives up after 100
GRACE = 10.0  # seconds that a process has to leave by itself once it is known that another one has left
LEFT_WITHIN = 30.0  # seconds that a process which fails waits for the others, for whom it may hold the service


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Watches over the other processes while the block runs, and lets them know how it ended.

    Raises `RunFailed` where the block fails because of another process. Where it does not end by itself, the process
    does, with exit code 1.
    """
    if jax.process_count() == 1:
        yield
        return
    peers = Peers()
    try:
        yield
    except BaseException as error:
        others = peers.announce_end(one_line(error, longest=None))
        if isinstance(error, jax.errors.JaxRuntimeError):  # as when a peer is gone in the middle of a step
            raise RunFailed(others or f"this process lost the others: {one_line(error)}") from error
        raise
    peers.announce_end("")


class Peers:
    """Signs of life of this process and of the others, from a thread of its own until `announce_end`."""

    def __init__(self):
        self._client = ocp.multihost.get_jax_distributed_client()
        self._seen = {i: ("", time.monotonic()) for i in range(jax.process_count()) if i != jax.process_index()}
        self._gone: dict[int, str] = {}  # by process why it left; "": it was done
        self._leaving = threading.Event()
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def announce_end(self, fault: str) -> str:
        """Tells the others that this process leaves, and with a fault waits until they have left or for `LEFT_WITHIN`.

        Returns on one line which other process failed before; "" if none did.
        """
        self._leaving.set()
        self._thread.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._look()
            before = self._describe()
            self._tell({"left": before or fault})
            until = time.monotonic() + LEFT_WITHIN
            while fault and len(self._gone) < len(self._seen) and time.monotonic() < until:
                time.sleep(EVERY / 4)
                self._look()
            return before
        return "process 0 is gone"

    def _watch(self) -> None:
        told = None  # when it became known that another one has failed
        while not self._leaving.wait(EVERY):
            try:
                self._beat()
                self._look()
            except jax.errors.JaxRuntimeError:  # the service is gone, and jax aborts
                return
            told = told or (time.monotonic() if any(self._gone.values()) else None)
            if told and time.monotonic() > told + GRACE:
                with contextlib.suppress(jax.errors.JaxRuntimeError):
                    self._tell({"left": self._describe()})
                if jax.process_index() == 0:  # whose service the others still read
                    time.sleep(2 * EVERY)
                _end(self._describe())

    def _beat(self) -> None:
        self._beats += 1
        self._tell({"beat": self._beats})

    def _tell(self, sign: dict) -> None:
        self._client.key_value_set(_key(jax.process_index()), json.dumps(sign), allow_overwrite=True)

    def _look(self) -> None:
        now = time.monotonic()
        for number, (before, since) in self._seen.items():
            if number in self._gone:
                continue
            try:
                sign = self._client.key_value_try_get(_key(number))
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" not in str(error):
                    raise
                sign = ""  # it has not begun
            if "left" in (said := json.loads(sign or "{}")):
                self._gone[number] = said["left"]
            elif sign != before:
                self._seen[number] = sign, now
            elif now > since + DEAD_AFTER:
                self._gone[number] = f"it gives no sign of life since {now - since:.0f} s"

    def _describe(self) -> str:
        return next((f"process {i} failed: {why}" for i, why in self._gone.items() if why), "")


def _key(process: int) -> str:
    return f"sparse_lm/peers/{process}"


def _end(why: str) -> None:
    print(f"sparse-lm: {why}", file=sys.stderr, flush=True)
    os._exit(1)
