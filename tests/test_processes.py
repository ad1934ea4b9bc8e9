"""Two processes of four devices each are one process of eight."""

import json
import resource
import subprocess
import time

import jax
import numpy as np
import pytest

from sparse_lm.runs.folder import read_rows
from tests import commands

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2"]


def start_two_processes(*arguments, apart=0.0, of_first=None) -> list[subprocess.Popen]:
    """The command in two processes, the second so many seconds later, the first with other options of Popen."""
    port = commands.free_port()
    join = lambda i: [f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}"]
    first = commands.start(*arguments, *join(0), devices=4, **of_first or {})
    time.sleep(apart)
    return [first, commands.start(*arguments, *join(1), devices=4)]


def run_in_two_processes(*arguments) -> list[str]:
    return [commands.finish(process) for process in start_two_processes(*arguments)]


def train_in_two_processes(config, workdir, *arguments) -> list[str]:
    return run_in_two_processes("train", f"--config={config}", f"--workdir={workdir}", *MESH, *arguments)


def curve(workdir) -> np.ndarray:
    return np.array([row["loss"] for row in read_rows(workdir, "metrics")])


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_and_go_on_with_its_run(tmp_path):
    config = commands.write_config(tmp_path, steps=20)
    one = ["train", f"--config={config}", *MESH]
    commands.run(*one, f"--workdir={tmp_path}/one", devices=8)
    said = train_in_two_processes(config, tmp_path / "two")
    assert not any("involuntary" in text.lower() for text in said)
    np.testing.assert_allclose(curve(tmp_path / "two"), curve(tmp_path / "one"), rtol=1e-4)
    assert len(curve(tmp_path / "two")) == 20

    half = "--config.training.steps=10"
    constant = "--config.optimizer.schedule.name=constant"
    commands.run(*one, f"--workdir={tmp_path}/whole", constant, devices=8)
    commands.run(*one, f"--workdir={tmp_path}/mixed", half, constant, devices=8)
    train_in_two_processes(config, tmp_path / "mixed", constant)
    np.testing.assert_allclose(curve(tmp_path / "mixed"), curve(tmp_path / "whole"), rtol=1e-4)
    commands.run(
        "train", f"--config={config}", constant, f"--workdir={tmp_path}/mixed", "--config.training.steps=24", devices=1
    )
    assert len(curve(tmp_path / "mixed")) == 24 and jax.process_count() == 1


@pytest.mark.slow
def test_two_processes_compare_as_one_does(tmp_path):
    config = commands.write_config(tmp_path, steps=12)
    arguments = ["compare", f"--config={config}", "--seeds=2", "--config.evaluation.splits=validation", *MESH]
    commands.run(*arguments, f"--workdir={tmp_path}/one", devices=8)
    first, second = run_in_two_processes(*arguments, f"--workdir={tmp_path}/two")
    assert "written:" in first and "written:" not in second
    one, two = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two"))
    found, expected = (r["differences"]["validation"] for r in (two, one))
    assert found["rows"] == expected["rows"] and found["per_seed"] == pytest.approx(expected["per_seed"], abs=1e-4)
    assert (tmp_path / "two/comparison.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_other_command_with_two_processes_says_what_one_does(tmp_path):
    config, run = commands.write_config(tmp_path, steps=10), f"--workdir={tmp_path}/run"
    train_in_two_processes(config, tmp_path / "run")
    assert "is finished" in train_in_two_processes(config, tmp_path / "run")[0]
    one = commands.run("evaluate", run, devices=8)
    first, second = run_in_two_processes("evaluate", run)
    loss = lambda said: json.loads(said[said.index("{") : said.rindex("}") + 1])["evaluation"]["validation"]["loss"]
    assert loss(first) == pytest.approx(loss(one), rel=1e-5) and "{" not in second


@pytest.mark.slow
def test_a_process_that_comes_a_minute_later_is_waited_for(tmp_path):
    config = commands.write_config(tmp_path, steps=10)
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path}/run", *MESH]
    for process in start_two_processes(*arguments, apart=60.0):
        commands.finish(process)
    assert len(curve(tmp_path / "run")) == 10


LONG = ["--config.training.steps=1000000", "--config.checkpoints.every=1000000", "--config.evaluation.every=1000000"]


@pytest.mark.slow
def test_a_full_disk_in_one_process_ends_both(tmp_path):
    config = commands.write_config(tmp_path)
    arguments = ["train", f"--config={config}", f"--workdir={tmp_path}/run", *MESH, *LONG]
    commands.run(
        *arguments, "--config.training.steps=1", f"--workdir={tmp_path}/before", devices=8
    )  # prepares the text
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    first, second = start_two_processes(*arguments, of_first={"preexec_fn": full})
    assert "File too large" in commands.finish(first, 2)
    said = commands.finish(second, 1)
    assert "process 0 failed: " in said and "File too large" in said and "Traceback" not in said
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(tmp_path):
    config = commands.write_config(tmp_path)
    first, second = start_two_processes("train", f"--config={config}", f"--workdir={tmp_path}/run", *MESH, *LONG)
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert first.poll() is second.poll() is None
        time.sleep(0.5)
    second.kill()
    said = commands.finish(first, 1)  # within 300 s
    assert "sparse-lm: this process lost the others" in said and "Traceback" not in said
    second.communicate()
