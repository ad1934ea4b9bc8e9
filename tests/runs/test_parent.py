"""A run reads the one that it begins from once, and is that run's child wherever that run then is."""

import json
import shutil

import jax.numpy as jnp
import pytest

from sparse_lm import config as configs
from sparse_lm import runs
from sparse_lm.errors import UserError
from sparse_lm.runs import replay
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.folder import read_info, read_rows
from sparse_lm.runs.parent import Parent, find_parent
from tests import tiny


def make_run(path, value: float = 0.0, steps=(2, 4), parent: Parent | None = None):
    """What a run's folder has that matters here."""
    path.mkdir(exist_ok=True)
    info = {"init_from": parent.run, "init_from_digest": parent.digest} if parent else {"init_from": ""}
    (path / "config.json").write_text(json.dumps(info))
    with Checkpoints(path / "checkpoints", keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"parameters": {"w": jnp.full(3, value + step)}, "router": {}}, {"at": step})
    return path


@pytest.fixture
def parent(tmp_path):
    return make_run(tmp_path / "parent")


@pytest.fixture
def child(parent, tmp_path):
    """A run with a checkpoint of its own, which began from the parent's step 4."""
    return make_run(tmp_path / "child", value=7.0, parent=find_parent(tmp_path / "child", str(parent)))


def refused(workdir, asked, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        find_parent(workdir, str(asked))
    assert "\n" not in str(error.value)


def test_a_new_run_begins_from_a_saved_step(parent, tmp_path, monkeypatch):
    new = tmp_path / "new"
    assert find_parent(new, "") == Parent()
    monkeypatch.chdir(tmp_path)
    newest, older = find_parent(new, "parent"), find_parent(new, "parent@2")
    assert newest.run == f"{parent}@4" and older.run == f"{parent}@2"
    assert (newest.path, newest.step) == (str(parent), 4)
    assert newest.digest and newest.digest != older.digest
    refused(new, "nowhere", "there is no run in .*nowhere: it does not exist")
    refused(new, "parent@3", "can't begin from parent@3: it has saved steps 2, 4")
    shutil.rmtree(parent / "checkpoints")
    refused(new, "parent", "it has saved no step")


def test_a_run_with_a_checkpoint_of_its_own_does_not_need_its_parent(parent, child, tmp_path):
    stored = find_parent(child, "")
    assert stored.run == f"{parent}@4"
    shutil.copytree(parent, tmp_path / "moved")
    shutil.rmtree(parent / "checkpoints/4")  # it went on, and keeps other steps
    assert find_parent(child, str(parent)) == stored
    shutil.rmtree(parent)
    for asked in ("", parent, f"{parent}@4", tmp_path / "elsewhere"):
        assert find_parent(child, str(asked)) == stored
    for asked in ("moved", "moved@4"):
        assert find_parent(child, f"{tmp_path}/{asked}") == Parent(f"{tmp_path}/moved@4", stored.digest)


def test_another_parent_is_refused_where_it_can_be_told(parent, child, tmp_path):
    other = make_run(tmp_path / "other", value=1.0)
    refused(child, other, f"{child} holds a run that began from {parent}@4, not from {other} as it is now")
    refused(child, f"{parent}@2", f"began from {parent}@4, not from {parent}@2")
    refused(child, make_run(tmp_path / "short", steps=(2,)), "not from .*short")
    refused(parent, child, f"began from no other run, not from {child}")
    shutil.rmtree(parent)
    refused(child, other, "not from .*other as it is now")
    make_run(parent, value=2.0)
    refused(child, parent, "not from .*parent as it is now; without --init-from it goes on")
    assert find_parent(child, "").run == f"{parent}@4"


def test_of_a_run_that_stored_no_digest_the_places_are_compared(parent, tmp_path):
    child = make_run(tmp_path / "child", parent=Parent(f"{parent}@4"))
    other = make_run(tmp_path / "other", value=1.0)
    (tmp_path / "link").symlink_to(parent)
    for asked in ("", parent, f"{parent}@4", tmp_path / "link", tmp_path / "nowhere"):
        assert find_parent(child, str(asked)) == Parent(f"{parent}@4")
    refused(child, other, "not from .*other")
    refused(child, f"{parent}@2", "not from .*parent@2")
    shutil.rmtree(parent)
    assert find_parent(child, str(other)) == Parent(f"{parent}@4")  # it may have been moved there


def test_a_run_without_a_checkpoint_of_its_own_needs_its_parent(parent, tmp_path):
    stored = find_parent(tmp_path / "child", str(parent))
    child = make_run(tmp_path / "child", parent=stored, steps=())
    assert find_parent(child, "") == find_parent(child, str(parent)) == stored
    parent.rename(tmp_path / "moved")
    words = f"{child}, which has no checkpoint of its own yet, begins from {parent}@4, which can't be used: there is no"
    refused(child, "", words)
    refused(child, parent, words)
    assert find_parent(child, f"{tmp_path}/moved").run == f"{tmp_path}/moved@4"
    make_run(parent, value=5.0)
    refused(child, "", "whose parameters are not those that were there")

    shutil.rmtree(parent)
    make_run(child, parent=Parent(f"{parent}@4"), steps=())
    refused(child, "", words)
    assert find_parent(child, f"{tmp_path}/moved").run == f"{tmp_path}/moved@4"


def test_a_child_goes_on_and_is_replayed_wherever_its_parent_is(config, trained, tmp_path):
    """On other text, which would train another tokenizer, in which the parameters' rows mean other tokens."""
    (tmp_path / "other").mkdir()
    for i in range(50):
        (tmp_path / f"other/{i}.txt").write_text(f"quite different words {i} here " * 10)
    first, second = shutil.copytree(trained, tmp_path / "first"), tmp_path / "second"
    # Learning nothing, it stays what it began from.
    fields = {
        "data__sources": (f"folder:{tmp_path}/other",),
        "training__seed": 5,
        "optimizer__learning_rate": 1e-12,
        "optimizer__weight_decay": 0.0,
        "optimizer__schedule": configs.choice("constant"),
        "evaluation__every": 99,
    }
    train = lambda steps, asked: runs.train(config(**fields, training__steps=steps), second, str(asked))
    train(6, f"{first}@8")
    begun, now = runs.load(str(trained), 8), runs.load(str(second))
    tiny.close(now.parameters, begun.parameters, 1e-6)
    assert now.tokenizer.file == begun.tokenizer.file
    assert read_info(second)["init_from"] == f"{first}@8" and "other" not in now.config.data.tokenizer

    first.rename(tmp_path / "moved")
    assert train(7, first)["steps"] == 7  # the same command
    assert replay.replay(str(second), 7).row["step"] == 7  # from its own checkpoint
    with pytest.raises(UserError, match=f"step 2 of {second}, run again, begins from {first}@8, which can't be used"):
        replay.replay(str(second), 2)
    with pytest.raises(UserError, match=f"there is no run in {first}"):
        runs.train(config(**fields), tmp_path / "third", str(first))
    assert not (tmp_path / "third").exists()

    train(8, tmp_path / "moved")
    again = replay.replay(str(second), 2).row["loss"]
    assert again == pytest.approx(read_rows(second, "metrics")[1]["loss"], rel=1e-5)
