"""Lines of progress where there is no terminal, and durations in words."""

import pytest

from sparse_lm.runs import progress


@pytest.mark.parametrize(
    "seconds, words",
    [(0.4, "0 s"), (45.0, "45 s"), (100.0, "2 min"), (3600.0, "60 min"), (9e3, "2.5 h"), (345_600.0, "4.0 days")],
)
def test_durations(seconds, words):
    assert progress.duration(seconds) == words


def test_lines_come_now_and_then_and_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = progress.Progress("run", start=0, stop=20, shown=True)
    for step in (10, 20):
        shown.show({"step": step, "loss": 2.0})
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("run: step 10/20, loss 2.000, ") and first.endswith(" left")
    assert last == "run: step 20/20, loss 2.000"
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e9)
    shown.show({"step": 11, "loss": 2.0})
    quiet = progress.Progress("run", start=0, stop=20, shown=False)
    quiet.show({"step": 20, "loss": 2.0})
    assert capsys.readouterr().err == ""
