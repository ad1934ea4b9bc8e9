"""A process that fails or dies ends the other one soon, with one line."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.commands import free_port

SCRIPT = """
import sys, time
import jax
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.runs import peers

port, me, act = sys.argv[1], int(sys.argv[2]), sys.argv[3]
peers.EVERY, peers.DEAD_AFTER, peers.GRACE, peers.LEFT_WITHIN = 0.2, 4.0, 1.0, 8.0
jax.distributed.initialize(f"localhost:{port}", 2, me)
try:
    with peers.watch_peers():
        print("watches", flush=True)
        if me == 0:  # is slow, and asks nobody
            time.sleep(2.0 if act == "finish" else 60)
        elif act == "fail":
            raise OSError("it is\\nfull")
        elif act == "die":
            time.sleep(60)
        elif act == "break":
            raise jax.errors.JaxRuntimeError("INTERNAL: Gloo\\nbroke")
    print("done", flush=True)
except Exception as error:
    print(type(error).__name__, *str(error).split(), flush=True)
"""


@pytest.mark.parametrize(
    ("act", "code", "said", "printed"),
    [
        ("finish", 0, "", "done"),
        ("fail", 1, "sparse-lm: process 1 failed: it is full", "OSError it is full"),
        (
            "break",
            1,
            "sparse-lm: process 1 failed: INTERNAL: Gloo broke",
            "RunFailed this process lost the others: INT",
        ),
        ("die", 1, "sparse-lm: process 1 failed: it gives no sign of life since 4 s", ""),
    ],
)
def test_the_other_ends_with_it(act, code, said, printed):
    port = free_port()
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port), str(i), act],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    slow, other = start(0), start(1)
    try:
        assert other.stdout.readline() == slow.stdout.readline() == "watches\n"
        if act == "die":
            os.kill(other.pid, signal.SIGKILL)
        begun = time.monotonic()
        out, err = slow.communicate(timeout=45)
        assert time.monotonic() - begun < 30
        assert slow.returncode == code and said in err, err
        assert out.strip() == ("done" if act == "finish" else "")
        assert printed in other.communicate(timeout=45)[0]
    finally:
        slow.kill()
        other.kill()
