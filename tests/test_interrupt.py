"""Ctrl-C at any time while a command starts ends it at once, without a traceback."""

import signal
import subprocess
import sys
import time

import pytest

from tests import commands

# After the interpreter's own start, which is not ours; and as in a terminal, where tests run in a script's background,
# whose processes ignore the signal.
START = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from sparse_lm.__main__ import main
print("begins", flush=True)
main()
"""


@pytest.mark.parametrize("after", [0.3, 0.6, 1.0, 1.5, 2.5, 4.0])
def test_while_it_starts(tmp_path, after):
    config = commands.write_config(tmp_path, steps=100_000)
    command = [sys.executable, "-c", START, "train", f"--config={config}", f"--workdir={tmp_path}/run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "begins\n"
            time.sleep(after)
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=240)[1]
        finally:
            process.kill()
    assert "Traceback" not in said, said
    assert process.returncode in (-signal.SIGINT, 130), said
