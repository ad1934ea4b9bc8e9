"""Two processes of four devices each are one process of eight."""

import json
import socket

import jax
import numpy as np
import pytest

from sparse_lm.runs.folder import read_rows
from tests import commands

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2"]


def run_in_two_processes(*arguments) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    join = lambda i: [f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}"]
    processes = [commands.start(*arguments, *join(i), devices=4) for i in range(2)]
    return [commands.finish(process) for process in processes]


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
