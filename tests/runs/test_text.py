"""A run has one tokenizer, which is in its folder."""

import dataclasses

import pytest

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.runs.text import choose_tokenizer, find_tokenizer, load_tokenizer
from tests import tiny


@pytest.fixture
def files(trained, tmp_path):
    """Folders of two runs: `kept` with a tokenizer, `begun` without one; and another tokenizer's file."""
    for name in ("kept", "begun"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "kept/tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    (tmp_path / "other.json").write_text("{}")
    return tmp_path


def with_tokenizer(file) -> configs.Config:
    config = tiny.config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=str(file)))


def test_a_run_keeps_the_tokenizer_that_it_began_with(files):
    kept = str(files / "kept/tokenizer.json")
    same = files / "same.json"
    same.write_bytes((files / "kept/tokenizer.json").read_bytes())
    for named in ("", same, files / "gone.json"):  # a run of 0.2.0 names its parent's, which may be gone
        assert choose_tokenizer(with_tokenizer(named), files / "kept", str(files / "begun")) == kept
    with pytest.raises(UserError, match=f"kept holds a run with another tokenizer than data.tokenizer={files}/other"):
        choose_tokenizer(with_tokenizer(files / "other.json"), files / "kept")


def test_a_new_run_takes_the_one_named_or_its_parents(files):
    other, kept = str(files / "other.json"), str(files / "kept")
    for run in (files / "begun", files / "new"):
        assert choose_tokenizer(with_tokenizer(""), run) == ""
        assert choose_tokenizer(with_tokenizer(other), run, kept) == other
        assert choose_tokenizer(with_tokenizer(""), run, kept) == f"{kept}/tokenizer.json"
    with pytest.raises(UserError, match="begun holds no tokenizer; a run keeps one"):
        choose_tokenizer(with_tokenizer(""), files / "new", str(files / "begun"))


def test_a_stray_file_in_a_folder_without_a_run_is_not_taken(files):
    (files / "kept/config.json").unlink()
    assert find_tokenizer(files / "kept") == ""
    assert choose_tokenizer(with_tokenizer(""), files / "kept") == ""


def test_the_tokenizer_is_loaded_from_the_folder(trained, files):
    text = "the cat sat on a mat"
    tokenizer = load_tokenizer(files / "kept")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    (files / "kept/tokenizer.json").rename(files / "kept/tokenizer.model")
    assert find_tokenizer(files / "kept") == str(files / "kept/tokenizer.model")
