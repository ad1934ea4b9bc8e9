"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Iterator

PHASES = ("compilation", "evaluation", "checkpoints", "restoring", "data")


class Clock:
    """Seconds in each phase; everything outside one is training.

    `seconds` are those of training since step 0, over interruptions. The goodput is its share of the time since the
    process began the run.
    """

    def __init__(self, earlier: float = 0.0):
        self._earlier = earlier
        self._start = time.monotonic()
        self.spent = dict.fromkeys(PHASES, 0.0)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[name] += time.monotonic() - start

    @property
    def total(self) -> float:
        return time.monotonic() - self._start

    @property
    def seconds(self) -> float:
        return self._earlier + self.total - sum(self.spent.values())

    def resume(self, earlier: float) -> None:
        self._earlier = earlier

    @property
    def goodput(self) -> float:
        return (self.seconds - self._earlier) / max(self.total, 1e-9)
