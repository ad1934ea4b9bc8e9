"""Folders written by released versions open, generate, evaluate and go on as the version that wrote them did."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm import runs
from sparse_lm.runs.folder import read_config, read_rows
from sparse_lm.serving import Generator, Sampling

ROOT = pathlib.Path(__file__).parents[2]
RUNS = [
    ("0.1.0", "switch"),
    ("0.2.0", "switch"),
    ("0.2.0", "deepseek"),
    ("0.2.0", "depths"),
    ("0.2.0", "blocks"),
    ("0.2.0", "child"),  # of a run that is gone
]


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> pathlib.Path:
    """A folder of each version, with text/, expected.json and its runs; not to be changed."""
    folder = tmp_path_factory.mktemp("old")
    for version in {version for version, _ in RUNS}:
        with tarfile.open(ROOT / f"tests/fixtures/runs/{version}.tar.xz") as tar:
            tar.extractall(folder / version, filter="data")
    return folder


def expected(unpacked: pathlib.Path, version: str, name: str) -> dict:
    return json.loads((unpacked / version / "expected.json").read_text())[name]


def generate(path: pathlib.Path, prompts: list[str]) -> list[list[int]]:
    """The eight most probable tokens after each prompt."""
    model = runs.load(str(path))
    generator = Generator(
        model.config.model,
        model.parameters,
        model.router,
        end_of_text=model.tokenizer.end_of_text,
        max_tokens=8,
        sampling=Sampling(0.0, 0, 1.0),
        vocabulary=model.tokenizer.vocabulary_size,
        mesh=model.program.mesh,
    )
    return generator.generate([model.tokenizer.encode(prompt) for prompt in prompts], [0] * len(prompts))


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_it_generates_what_it_did_from_its_folder_alone(unpacked, tmp_path, monkeypatch, version, name):
    shutil.copytree(unpacked / version / name, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)  # where there is no text
    wanted = expected(unpacked, version, name)
    assert generate(pathlib.Path("moved"), wanted["prompts"]) == wanted["generated"]


@pytest.mark.parametrize(("version", "name"), RUNS)
def test_it_evaluates_and_goes_on_as_it_did(unpacked, tmp_path, monkeypatch, version, name):
    for part in ("text", name):
        shutil.copytree(unpacked / version / part, tmp_path / part)
    monkeypatch.chdir(tmp_path)  # the run's config says folder:text
    wanted = expected(unpacked, version, name)
    measured = runs.evaluate(name)["evaluation"]
    losses = {split: values["loss"] for split, values in measured.items()}
    assert losses == pytest.approx(wanted["evaluation at 4"], abs=1e-6)

    config = read_config(name)
    training = dataclasses.replace(config.training, steps=6)
    runs.train(configs.resolve(dataclasses.replace(config, training=training)), name)
    rows = read_rows(name, "metrics")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([row["loss"] for row in rows[4:]], wanted["loss"], rtol=0, atol=1e-5)


ON_EIGHT = """
import json, math, pathlib, sys
import jax
from sparse_lm import runs
from tests.runs.test_old_runs import generate
assert len(jax.devices()) == 8
for path, prompts in json.loads(sys.argv[1]):
    leaves = jax.tree.leaves(runs.load(path).parameters)
    of_each = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)
    print(json.dumps([of_each, generate(pathlib.Path(path), prompts)]))
"""


def test_they_generate_the_same_divided_over_eight_devices(unpacked, tmp_path):
    asked, wanted = [], []
    for version, name in RUNS:
        path = shutil.copytree(unpacked / version / name, tmp_path / version / name)
        stored = json.loads((path / "config.json").read_text())
        stored["config"]["mesh"] = {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}  # of devices that are not here
        (path / "config.json").write_text(json.dumps(stored))
        wanted.append(expected(unpacked, version, name))
        asked.append((str(path), wanted[-1]["prompts"]))
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", ON_EIGHT, json.dumps(asked)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [generated for _, generated in found] == [one["generated"] for one in wanted]
    assert all(1 / 8 <= of_each < 1 / 7 for of_each, _ in found), found
