"""A run that is killed, or told to leave, goes on as if nothing had been."""

import json
import random
import re
import signal
import time

import jax
import pytest

from sparse_lm import runs
from sparse_lm.runs.folder import read_rows
from tests import commands, tiny


def parameters(workdir) -> dict:
    return jax.device_get(runs.load(str(workdir)).parameters)


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path):
    """SIGKILL at random moments, some while a checkpoint is being written; then bit-identical parameters, every step
    once, and on every step the batch of an uninterrupted run (its loss is the same)."""
    config = commands.write_config(tmp_path, steps=60)
    train = ["train", f"--config={config}"]
    commands.run(*train, f"--workdir={tmp_path}/whole")
    draw, killed, while_saving = random.Random(1), 0, 0
    folder = tmp_path / "killed"
    while killed < 10:
        process = commands.start(*train, f"--workdir={folder}")
        before = len(read_rows(folder, "metrics")) if folder.exists() else 0
        aim = before + draw.randint(1, 9)
        in_save = killed % 3 == 0
        while process.poll() is None:
            saving = any(".orbax" in p.name or "tmp" in p.name for p in folder.glob("checkpoints/*"))
            if (in_save and saving) or (not in_save and len(read_rows(folder, "metrics")) >= aim):
                break
            time.sleep(0.002)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed, while_saving = killed + 1, while_saving + in_save
    assert killed == 10 and while_saving >= 3
    commands.run(*train, f"--workdir={folder}")
    rows, expected = read_rows(folder, "metrics"), read_rows(tmp_path / "whole", "metrics")
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    tiny.equal(parameters(folder), parameters(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_with_its_code(tmp_path, number):
    config = commands.write_config(tmp_path, steps=2000)
    process = commands.start("train", f"--config={config}", f"--workdir={tmp_path}/run")
    while len(read_rows(tmp_path / "run", "metrics") if (tmp_path / "run").exists() else []) < 7:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    message = commands.finish(process, 128 + number)
    step = int(re.search(r"stopped after step (\d+) of 2000, and saved", message)[1])
    assert (tmp_path / f"run/checkpoints/{step}").exists() and "Traceback" not in message
    assert not (tmp_path / "run/summary.json").exists()
    last = read_rows(tmp_path / "run", "metrics")[-1]["step"]
    steps = f"--config.training.steps={step + 2}"
    commands.run("train", f"--config={config}", f"--workdir={tmp_path}/run", steps)
    assert [row["step"] for row in read_rows(tmp_path / "run", "metrics")] == list(range(1, step + 3)) and last == step
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == step + 2
