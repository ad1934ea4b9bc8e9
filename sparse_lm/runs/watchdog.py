"""Says where a run hangs."""

import faulthandler
import sys
import threading
import time


class Watchdog:
    """While entered, a thread warns on stderr whenever `seconds` have passed without a `beat`; it ends nothing.

    The warning is one line that says for how long and where, then the Python stacks of all threads. It comes
    again after every further `seconds`. 0 seconds: never.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._last = ("at the start", time.monotonic())
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, what: str) -> None:
        """The run begins with something: "in step 12", "waiting for the batch of step 13"."""
        self._last = (what, time.monotonic())

    def __enter__(self) -> "Watchdog":
        self.beat("at the start")
        if self.seconds:
            self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._left.set()
        if self.seconds:
            self._thread.join()

    def _watch(self) -> None:
        seen, warnings = self._last, 0
        while True:
            if self._last is not seen:
                seen, warnings = self._last, 0
            what, since = seen
            rest = since + self.seconds * (warnings + 1) - time.monotonic()
            if rest > 0:
                if self._left.wait(rest):
                    return
            else:
                self._warn(what, self.seconds * (warnings + 1))
                warnings += 1

    def _warn(self, what: str, seconds: float) -> None:
        # The real stderr, which has the file descriptor that faulthandler writes to.
        line = f"WARNING: no progress for {seconds:.3g} s, {what}; the Python stacks of all threads:"
        print(f"\n{line}", file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
