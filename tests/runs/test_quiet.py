"""Orbax is quiet while a command runs, and as it was afterwards."""

import logging
import sys
import types

import pytest

from sparse_lm.runs.quiet import quiet_orbax


def record(path: str) -> logging.LogRecord:
    return logging.LogRecord("absl", logging.WARNING, path, 1, "said", None, None)


@pytest.fixture
def reported(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(sys, "unraisablehook", found.append)
    return found


def left_over(error: Exception, file: str = ""):
    code = types.SimpleNamespace(co_filename=file)
    return types.SimpleNamespace(exc_value=error, object=types.SimpleNamespace(cr_code=code))


def test_what_orbax_says_and_leaves_is_kept_back_and_nothing_else(reported):
    absl = logging.getLogger("absl")
    with quiet_orbax():
        assert not absl.filter(record("/venv/orbax/checkpoint/x.py")) and absl.filter(record("/venv/absl/x.py"))
        sys.unraisablehook(left_over(RuntimeError("Event loop is closed")))
        sys.unraisablehook(left_over(ValueError("no such array"), "/venv/orbax/checkpoint/x.py"))
        others = [left_over(RuntimeError("another")), left_over(ValueError("x"), "/venv/grain/x.py")]
        for other in others:
            sys.unraisablehook(other)
    assert reported == others


def test_all_is_restored_on_exit_within_another_too(reported):
    absl, hook = logging.getLogger("absl"), sys.unraisablehook
    filters = list(absl.filters)
    with quiet_orbax():
        inside, hook_inside = list(absl.filters), sys.unraisablehook
        with pytest.raises(ValueError), quiet_orbax():
            assert len(absl.filters) == len(filters) + 2
            raise ValueError
        assert (absl.filters, sys.unraisablehook) == (inside, hook_inside)
        assert not absl.filter(record("/venv/orbax/x.py"))
    assert absl.filters == filters and sys.unraisablehook is hook
    assert absl.filter(record("/venv/orbax/x.py"))
