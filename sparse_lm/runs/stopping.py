"""Leaving on SIGTERM and SIGINT: after a whole step, the same one in every process, with what a supervisor expects."""

import contextlib
import os
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from sparse_lm.errors import Stopped


class StopSignal:
    """While entered, SIGTERM and SIGINT are remembered instead of ending the process; the loop asks `requested`.

    A SIGINT after any signal raises `KeyboardInterrupt` at once. To be entered in the main thread and after
    `jax.distributed.initialize`, which puts a handler of its own in C++ in the place of SIGTERM's (for
    `multihost_utils.reached_preemption_sync_point`): the last one to be installed gets the signal.
    """

    def __init__(self):
        self.number: int | None = None
        self._at_once = ""
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: installed from C

    @contextlib.contextmanager
    def at_once(self, what: str) -> Iterator[None]:
        """While entered, nothing has to be saved: the first signal raises `Stopped`, which says what was being done."""
        self._at_once = what
        try:
            if self.number is not None:
                raise Stopped(f"stopped while {what}", self.exit_code)
            yield
        finally:
            self._at_once = ""

    def _receive(self, number: int, frame) -> None:
        if self.number is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if self._at_once:
            raise Stopped(f"stopped while {self._at_once}", self.exit_code)
        again = "; Ctrl-C again leaves at once, without saving" if number == signal.SIGINT else ""
        # Not print: the signal may have come in the midst of one.
        os.write(2, f"\n{signal.Signals(number).name}: leaving after this step{again}\n".encode())

    def requested(self, step: int) -> int | None:
        """The number of the signal that some process has got by now, in every process, or None.

        With several processes all have to call this at the same steps; it waits for all of them. Raises `RuntimeError`
        where they are at different steps.
        """
        if jax.process_count() > 1:
            seen = multihost_utils.process_allgather(np.array([step, self.number or 0], np.int32))
            if len(set(seen[:, 0].tolist())) > 1:
                raise RuntimeError(f"the processes are at different steps: {seen[:, 0].tolist()}")
            self.number = int(seen[:, 1].max()) or None
        return self.number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number (143 for SIGTERM, 130 for SIGINT), as a shell reports it; 0 without a signal."""
        return 128 + self.number if self.number else 0
