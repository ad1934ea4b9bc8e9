"""Where a run's time goes."""

import contextlib
import time
from collections.abc import Callable, Iterator

PHASES = ("training", "setup", "data", "restoring", "compilation", "evaluation", "checkpoints", "lost")


class Clock:
    """Seconds in each phase; a phase within another stops the outer one, and outside of all is setup.

    A run that is continued counts on from `resume`, with what was lost between its checkpoint and its end as a phase.
    beat: told what begins with a phase, for a watchdog.
    """

    def __init__(self, beat: Callable[[str], None] = lambda doing: None):
        self._beat = beat
        self.spent = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = "setup", time.monotonic()

    @contextlib.contextmanager
    def phase(self, name: str, doing: str = "") -> Iterator[None]:
        if doing:
            self._beat(doing)
        outer = self._phase
        self._charge(name)
        try:
            yield
        finally:
            self._charge(outer)

    def resume(self, spent: dict[str, float], lost: float) -> None:
        for name, seconds in (spent | {"lost": spent["lost"] + lost}).items():
            self.spent[name] += seconds

    @property
    def seconds(self) -> float:
        """Of training."""
        self._charge(self._phase)
        return self.spent["training"]

    @property
    def goodput(self) -> float:
        """The share of all time that was training whose result was kept."""
        return self.seconds / max(sum(self.spent.values()), 1e-9)

    def _charge(self, next_phase: str) -> None:
        now = time.monotonic()
        self.spent[self._phase] += now - self._since
        self._phase, self._since = next_phase, now
