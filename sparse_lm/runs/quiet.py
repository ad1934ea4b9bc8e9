"""Orbax kept off the screen: what goes wrong is raised, and what is raised is told on one line."""

import contextlib
import logging
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """While entered, Orbax logs nothing, and what its threads leave behind after a fault is not reported.

    Both the log and the report of such leftovers (`sys.unraisablehook`) belong to the whole process, so this is for
    commands, not for the library. On exit both are as they were.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def of_others(record: logging.LogRecord) -> bool:
        return "/orbax/" not in record.pathname

    def report(what) -> None:
        # The first fault ends Orbax's event loop; what else was under way there then fails in threads and collectors.
        code = getattr(what.object, "cr_code", None)
        late = isinstance(what.exc_value, RuntimeError) and str(what.exc_value) == "Event loop is closed"
        if not late and not (code and "/orbax/" in code.co_filename):
            hook(what)

    logger.addFilter(of_others)
    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(of_others)
