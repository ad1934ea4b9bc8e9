"""A small text, and configs of runs on it that take seconds."""

import json
import pathlib
import random

import pytest

from sparse_lm import config as configs
from sparse_lm import runs
from sparse_lm.runs.checkpoints import Checkpoints
from tests import tiny
from tests.runs.saved import shifted

WORDS = "the cat sat on a mat and then went away to see what other cats do all day long".split()


def write_text(folder: pathlib.Path, texts: int = 200, seed: int = 0) -> pathlib.Path:
    """A folder of texts of random words."""
    folder.mkdir(exist_ok=True)
    draw = random.Random(seed)
    for i in range(texts):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(WORDS, k=60)))
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> pathlib.Path:
    """A folder of 200 texts, and its cache beside it."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def config(text):
    """Makes a config: `config(training__steps=4)` sets training.steps."""

    def make(**fields) -> configs.Config:
        made = tiny.config(
            **{
                "model__vocabulary": 300,
                "model__experts": 4,
                "training__steps": 12,
                "evaluation__every": 6,
                "evaluation__rows": 8,
                "evaluation__final_rows": 8,
                "checkpoints__every": 4,
                "logging__every": 1,
                "logging__progress": False,
                "data__sources": (f"folder:{text}",),
            }
            | fields
        )
        values = configs.to_dict(made) | {"cache": str(text.parent / "cache"), "name": "tiny"}
        return configs.resolve(configs.from_dict(values))

    return make


@pytest.fixture(scope="session")
def trained(config, tmp_path_factory) -> pathlib.Path:
    """The folder of a finished run of `config()`, not to be changed."""
    path = tmp_path_factory.mktemp("trained") / "run"
    summary = runs.train(config(), path)
    assert json.loads((path / "summary.json").read_text()) == summary
    return path


@pytest.fixture
def two(tmp_path):
    """Checkpoints 1 and 2, in that order."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, shifted(1), {"at": 1})
        checkpoints.save(2, shifted(2), {"at": 2})
    return tmp_path
