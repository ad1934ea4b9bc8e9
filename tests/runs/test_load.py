"""A run's folder opens by itself; evaluation needs a text, and replaying the run's own."""

import json
import shutil

import jax
import numpy as np
import pytest

from sparse_lm import data, runs
from sparse_lm.errors import UserError
from sparse_lm.runs import replay
from sparse_lm.runs.folder import read_rows
from sparse_lm.serving import Generator, Sampling
from tests import tiny
from tests.runs.conftest import write_text


@pytest.fixture
def run(trained, text, tmp_path):
    """A run in tmp_path/run on the text in tmp_path/text; both may be changed."""
    shutil.copytree(text, tmp_path / "text")
    path = shutil.copytree(trained, tmp_path / "run")
    stored = (path / "config.json").read_text()
    (path / "config.json").write_text(stored.replace(f"folder:{text}", f"folder:{tmp_path}/text"))
    return path


def validation(measured: dict) -> float:
    return measured["evaluation"]["validation"]["loss"]


def test_a_model_opens_without_its_text_and_elsewhere(trained, run, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "text")
    run.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "prepare", None)
    here, there = runs.load("moved"), runs.load(str(trained))
    tiny.equal((here.parameters, here.router, here.step), (there.parameters, there.router, 12))
    assert here.tokenizer.file == (trained / "tokenizer.json").read_bytes()
    generated = []
    for model in (here, there):
        ends = {"end_of_text": model.tokenizer.end_of_text, "max_tokens": 3, "sampling": Sampling(0.0, 0, 1.0)}
        generator = Generator(model.config.model, model.parameters, model.router, mesh=model.program.mesh, **ends)
        generated.append(generator.generate([model.tokenizer.encode("the cat")], [0]))
    assert generated[0] == generated[1] and len(generated[0][0]) == 3
    assert runs.load("moved", step=8).step == 8
    with pytest.raises(UserError, match="no checkpoint 5 .*there are: 8, 12"):
        runs.load("moved", step=5)


def test_evaluation_repeats_the_last_row(trained):
    again, last = runs.evaluate(str(trained)), read_rows(trained, "eval")[-1]
    assert again["step"] == 12 and again["leak"] == ""
    assert validation(again) == pytest.approx(last["loss"], rel=1e-6)
    assert np.isfinite(again["evaluation"]["validation"]["bits_per_byte"])
    at_training = runs.evaluate(str(trained), capacity_factor=1.25)["evaluation"]["validation"]
    assert at_training["loss"] == at_training["loss_train_capacity"]
    assert at_training["loss"] == pytest.approx(last["loss_train_capacity"], rel=1e-6)


def test_what_needs_the_text_says_so_where_it_is_gone_or_has_changed(run, tmp_path):
    def said(ask) -> str:
        with pytest.raises(UserError) as error:
            ask()
        assert "\n" not in str(error.value)
        return str(error.value)

    evaluate, again = lambda: runs.evaluate(str(run)), lambda: replay.replay(str(run), 7)
    wanted = f"this needs the text that {run} was trained on"
    (tmp_path / "text").rename(tmp_path / "moved")
    gone = f"{wanted}: data source folder:{tmp_path}/text: {tmp_path}/text does not exist; bring it back"
    assert said(evaluate) == f"{gone}, or evaluate on other text with --sources"
    assert said(again) == gone

    (tmp_path / "moved").rename(tmp_path / "text")
    (tmp_path / "text/more.txt").write_text("the cat came back the very next day")
    stored = json.loads((run / "config.json").read_text())["fingerprint"]
    for ask in (evaluate, again):
        assert said(ask).startswith(f"{wanted}, and it has changed: its fingerprint was {stored} and is ")

    (tmp_path / "text/more.txt").unlink()
    assert again().row["step"] == 7


def test_evaluation_on_other_text_has_the_tokenizer_of_the_run(trained, run, tmp_path, monkeypatch):
    (tmp_path / "text").rename(tmp_path / "moved")
    write_text(tmp_path / "other", texts=60, seed=1)
    monkeypatch.setattr("sparse_lm.data.tokenizer.train", lambda *_: pytest.fail("trains another tokenizer"))
    own, moved = validation(runs.evaluate(str(trained))), f"folder:{tmp_path}/moved"
    assert validation(runs.evaluate(str(run), sources=[moved])) == own
    measured = runs.evaluate(str(run), sources=[moved, f"folder:{tmp_path}/other"])
    assert measured["sources"] == [moved, f"folder:{tmp_path}/other"]
    losses = {split: values["loss"] for split, values in measured["evaluation"].items()}
    assert losses["validation_moved"] == own != losses["validation_other"]
    assert losses["validation_other"] == pytest.approx(own, abs=0.5)  # words of the same kind
    with pytest.raises(UserError, match="nowhere does not exist"):
        runs.evaluate(str(run), sources=["folder:nowhere"])


def test_a_folder_without_a_tokenizer_is_named(run):
    (run / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=f"{run} holds no tokenizer"):
        runs.load(str(run))


def test_a_library_call_leaves_the_process_as_it_was(trained):
    import logging
    import sys

    before = sys.unraisablehook, list(logging.getLogger("absl").filters)
    jax.block_until_ready(runs.load(str(trained)).parameters)
    assert (sys.unraisablehook, logging.getLogger("absl").filters) == before
