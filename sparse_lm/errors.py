"""The exceptions that a command answers with one line, and the nearest valid name or number."""

import difflib
import math
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where, and what would be right, on one line. Commands print it and exit with code 2."""


class DoesNotFit(UserError):
    """A size that the devices along an axis of the mesh do not divide, or a mesh that is not of these devices."""


class RunFailed(Exception):
    """A run that can't go on through no mistake on the command line. Printed on one line; exit code 1."""


class Stopped(Exception):
    """A run that was asked to stop by a signal and has saved its state. exit_code is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` where a valid name is close, otherwise the valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def nearest_divisor(near: int, *values: int, multiple: int = 1) -> int | None:
    """The number closest to `near` that divides all values and is a multiple of `multiple`; None where none is."""
    common = math.gcd(*values)
    divisors = (d for d in range(multiple, common + 1, multiple) if common % d == 0)
    return min(divisors, key=lambda d: abs(d - near), default=None)
