"""What processes tell each other arrives in all of them, and a failure in one ends all."""

import subprocess
import sys

import pytest

from sparse_lm.errors import UserError
from sparse_lm.runs.processes import ask_primary, exchange, together
from tests.commands import free_port

SCRIPT = """
import sys
import jax
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.runs.processes import ask_primary, exchange, together

me = int(sys.argv[2])
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, me)
print(exchange("numbers", {"me": me}), ask_primary("steps", lambda: [me, 7]))
for kind in (None, UserError, OSError):
    try:
        with together("the work"):
            if me == 1 and kind:
                raise kind("it\\nbroke")
        print("went well")
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
try:
    if me == 0:
        exchange("alone", None, timeout=0.5)
except RunFailed as error:
    print(str(error).partition(" (")[0])

"""


def test_one_process_has_nobody_to_ask():
    assert exchange("numbers", (1, 2)) == [(1, 2)] and ask_primary("steps", lambda: [3]) == [3]
    with pytest.raises(UserError, match="^wrong$"), together("the work"):
        raise UserError("wrong")


def test_all_learn_what_each_says_and_fail_with_the_one_that_fails():
    port = free_port()
    start = lambda i: subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(port), str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    (out, err), (other_out, other_err) = [process.communicate(timeout=120) for process in [start(0), start(1)]]
    said, other = out.splitlines(), other_out.splitlines()
    both = ["[{'me': 0}, {'me': 1}] [0, 7]", "went well"]
    assert said[:2] == both and other[:2] == both, err + other_err
    answers = [
        "UserError it broke",
        "RunFailed the work: process 1 failed: it broke",
        "alone: process 1 does not answer",
    ]
    assert said[2:] == answers
    assert other[2:4] == ["UserError it broke", "OSError it broke"]
