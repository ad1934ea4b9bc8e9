import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sparse_lm.errors import Stopped
from sparse_lm.runs.stopping import StopSignal
from tests.commands import free_port


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_is_remembered(number, code, capfd):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested(1) is None and stop.exit_code == 0
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested(2) == number
        assert stop.exit_code == code
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err.strip().startswith(f"{number.name}: leaving after this step")


def test_where_nothing_has_to_be_saved_the_first_signal_ends_at_once():
    with StopSignal() as stop:
        with (
            pytest.raises(Stopped, match="stopped while preparing the data") as left,
            stop.at_once("preparing the data"),
        ):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it goes on")
        assert left.value.exit_code == 143
        with pytest.raises(Stopped), stop.at_once("preparing more"):  # a signal that came before is seen too
            raise AssertionError("it goes on")
    with StopSignal() as stop:
        with stop.at_once("preparing the data"):
            pass
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested(1) == signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_after_a_signal_interrupts(first):
    with StopSignal(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGINT)


TRAIN = """
import sys, time, jax
from sparse_lm.errors import Stopped
from sparse_lm.runs.stopping import StopSignal
count = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], count, int(sys.argv[3]))
with StopSignal() as stop:
    for step in range(100_000):
        if stop.requested(step):
            break
        if step == 3:
            print("running", flush=True)
        time.sleep(0.01)
print(step, flush=True)
jax.distributed.shutdown()
sys.exit(stop.exit_code)
"""


@pytest.mark.parametrize("count", [1, 2])
def test_one_process_gets_the_signal_and_all_leave_at_the_same_step(count):
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", TRAIN, address, str(count)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(i)], env=env, **pipes) for i in range(count)]
    for process in processes:
        while "running" not in (line := process.stdout.readline()):  # after what the collectives' library says
            assert line
    processes[-1].send_signal(signal.SIGTERM)
    ends = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [143] * count, ends
    steps = {int(out.split()[-1]) for out, _ in ends}
    assert len(steps) == 1 and steps < {*range(3, 99_999)}
    assert "SIGTERM: leaving after this step" in ends[-1][1]


def test_a_signal_during_a_wait_is_seen_after_it():
    with StopSignal() as stop:
        threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        time.sleep(0.2)
        assert stop.requested(1) == signal.SIGTERM
