import re
import threading
import time

from sparse_lm.runs.watchdog import Watchdog


def hang(seconds: float) -> None:
    time.sleep(seconds)


def test_says_where_it_hangs_and_says_it_again(capfd):
    err = ""
    with Watchdog(0.2) as watchdog:
        watchdog.beat("in step 12")
        while err.count("WARNING") < 3:  # the third, so that the second is whole
            hang(0.05)
            err += capfd.readouterr().err
    warnings = [line for line in err.splitlines() if line.startswith("WARNING")]
    assert warnings[:2] == [
        "WARNING: no progress for 0.2 s, in step 12; the Python stacks of all threads:",
        "WARNING: no progress for 0.4 s, in step 12; the Python stacks of all threads:",
    ]
    assert re.search(r'File ".*test_watchdog.py", line \d+ in test_says_where', err)
    assert "Thread" in err


def test_is_silent_while_there_are_beats_and_after_it_is_left(capfd):
    with Watchdog(1.0) as watchdog:
        for step in range(5):
            watchdog.beat(f"in step {step}")
            hang(0.3)
    hang(1.2)
    assert capfd.readouterr().err == ""
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_zero_seconds_is_off(capfd):
    with Watchdog(0.0) as watchdog:
        watchdog.beat("in step 1")
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    assert capfd.readouterr().err == ""
