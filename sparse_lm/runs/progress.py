"""What a person sees while a run trains: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

LINE_SECONDS = 15.0  # between lines where there is no terminal


class Progress:
    """Shows steps, loss and the time left. `name` tells runs of one comparison apart."""

    def __init__(self, name: str, start: int, stop: int, shown: bool):
        self.name, self.stop = name, stop
        terminal = sys.stderr.isatty()
        form = "{desc}: {percentage:3.0f}%|{bar}| step {n}/{total}, {elapsed}<{remaining}{postfix}"
        bar = shown and terminal
        self._bar = tqdm(total=stop, initial=start, desc=name, bar_format=form, dynamic_ncols=True) if bar else None
        self._lines = shown and not terminal
        self._begun, self._start, self._shown = time.monotonic(), start, time.monotonic()

    def say(self, text: str) -> None:
        """A message that does not disturb the bar."""
        tqdm.write(text, file=sys.stderr)

    def show(self, row: dict) -> None:
        """row: of metrics.jsonl."""
        step, now = row["step"], time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.3f}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._lines and (now - self._shown > LINE_SECONDS or step == self.stop):
            self._shown = now
            left = (now - self._begun) / max(step - self._start, 1) * (self.stop - step)
            ahead = f", {duration(left)} left" if step < self.stop else ""
            self.say(f"{self.name}: step {step}/{self.stop}, loss {row['loss']:.3f}{ahead}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds in words: 45 s, 3 min, 2.5 h, 4.0 days."""
    for size, unit, digits in ((86_400, "days", 1), (3600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size or (unit == "min" and seconds >= 90):
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"
