"""The exceptions that a command prints on one line, and suggestions of valid names and numbers."""

import difflib
import math
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: what was wrong, where, and what would be right. Commands exit with code 2."""


class DoesNotFit(UserError):
    """A size that a mesh axis does not divide, or a mesh that does not match the number of devices."""


class RunFailed(Exception):
    """A run that can't go on, though the command line was right. Commands exit with code 1."""


class Stopped(Exception):
    """A run that a signal stopped after it saved its state. exit_code is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException, longest: int | None = 200) -> str:
    """The message of an error without line breaks, cut to `longest` characters; its class where it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "…"


def suggest(name: str, valid: Iterable[str]) -> str:
    """Returns `"; did you mean 'x'?"` if a valid name is close, otherwise the list of valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def nearest_divisor(target: int, *values: int, multiple: int = 1) -> int | None:
    """Finds the number closest to `target` that divides all values and is a multiple of `multiple`, if there is one."""
    common = math.gcd(*values)
    divisors = (d for d in range(multiple, common + 1, multiple) if common % d == 0)
    return min(divisors, key=lambda d: abs(d - target), default=None)
