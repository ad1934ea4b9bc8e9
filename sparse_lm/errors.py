"""The one exception for a mistake of the user's, and the nearest valid name."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What was wrong, where, and what would be right, on one line. Commands print it and exit with code 2."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` where a valid name is close, otherwise the valid names."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"
