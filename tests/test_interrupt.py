"""Ctrl-C at any time while a command starts ends it at once, without a traceback."""

import signal
import subprocess
import sys
import time

import pytest

from tests import commands


@pytest.mark.parametrize("after", [0.15, 0.3, 0.6, 1.0, 1.5, 2.5, 4.0])
def test_while_it_starts(tmp_path, after):
    config = commands.write_config(tmp_path, steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_lm", "train", f"--config={config}", f"--workdir={tmp_path}/run"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert "Traceback" not in said or "<frozen" in said, said  # the interpreter's own start is not ours
    assert process.returncode in (-signal.SIGINT, 130, 1)
