"""Two processes of four devices each are one process of eight."""

import socket

import jax
import numpy as np
import pytest

from sparse_lm.runs.folder import read_rows
from tests import commands

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.expert=2"]


def train_in_two_processes(config, workdir, *arguments) -> list[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["train", f"--config={config}", f"--workdir={workdir}", *MESH, *arguments]
    join = lambda i: [f"--coordinator=localhost:{port}", "--processes=2", f"--process={i}"]
    processes = [commands.start(*together, *join(i), devices=4) for i in range(2)]
    return [commands.finish(process) for process in processes]


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
