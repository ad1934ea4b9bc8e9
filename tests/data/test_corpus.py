import errno
import json
import pathlib
import subprocess
import sys
from collections import Counter

import grain
import numpy as np
import pytest

from sparse_lm import data
from sparse_lm.data import store
from sparse_lm.data import tokenizer as tokenizers
from sparse_lm.errors import UserError
from tests.data.texts import config, write_folder

FIELDS = ("inputs", "targets", "segments", "positions", "bytes")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("text") / "sea", 120)


@pytest.fixture(scope="module")
def corpus(cache, folder):
    return data.prepare(config(cache, f"folder:{folder}"))


def rows_of(batches, first, last, batch):
    steps = [batches.read(step, 0, batch) for step in range(first, last)]
    return {name: np.concatenate([step[name] for step in steps]) for name in FIELDS}


def texts_of(corpus, batches, batch):
    """Multiset of the documents in a finite run of batches, put together from their pieces by hand."""
    pieces, text = Counter(), []
    rows = rows_of(batches, 0, len(batches), batch)
    for targets, segments in zip(rows["targets"], rows["segments"], strict=True):
        for token in targets[segments != 0].tolist():
            if token == corpus.tokenizer.end_of_text:
                pieces[corpus.tokenizer.decode(text)] += 1
                text = []
            else:
                text.append(token)
    return pieces


def stored_in_order(corpus, kind, source=0):
    """All rows of a kind as they were packed."""
    (part,) = [i for i, part in enumerate(corpus.parts) if (part["kind"], part["source"]) == (kind, source)]
    rows = corpus._open_part(part)
    return data.Batches(rows, 1, corpus.length, len(rows))


def keys_of_rows(rows):
    return [row.tobytes() for row in rows["targets"]]


def stored_keys(corpus, kind, source):
    batches = stored_in_order(corpus, kind, source)
    return Counter(keys_of_rows(rows_of(batches, 0, len(batches), 1)))


def test_the_splits_are_the_folders_documents_each_once(corpus, folder):
    found = sum(
        (texts_of(corpus, stored_in_order(corpus, kind), 1) for kind in ("train", "validation", "test")), Counter()
    )
    assert found == Counter({path.read_text() for path in folder.iterdir()})
    assert corpus.split_names == ("train", "validation", "test")
    assert sum(part["bytes"] for part in corpus.parts) == sum(len(text.encode()) for text in found)


def test_an_evaluation_has_every_row_of_its_split_once(corpus):
    rows = rows_of(corpus.evaluation_batches("validation", 4), 0, len(corpus.evaluation_batches("validation", 4)), 4)
    (part,) = [part for part in corpus.parts if part["kind"] == "validation"]
    real = rows["segments"].any(1)
    assert real.sum() == part["rows"] and real[: part["rows"]].all()
    assert rows["bytes"].sum() == part["bytes"]
    assert (rows["segments"] != 0).sum() == part["tokens"]
    assert len({row.tobytes() for row in rows["targets"][real]}) > 0.8 * part["rows"]


def test_first_rows_of_an_evaluation(corpus):
    some, every = corpus.evaluation_batches("train", 4, 10), corpus.evaluation_batches("train", 5)
    assert len(some) == 3
    first, all_rows = rows_of(some, 0, 3, 4), rows_of(every, 0, len(every), 5)
    for name in FIELDS:
        np.testing.assert_array_equal(first[name][:10], all_rows[name][:10])
        assert not first[name][10:].any()


def test_an_unknown_split(corpus):
    with pytest.raises(UserError, match="no data split 'validaton'; did you mean 'validation'"):
        corpus.evaluation_batches("validaton", 4)


def test_a_training_batch_is_a_function_of_seed_and_number(corpus):
    one, again, other = corpus.training_batches(0, 8), corpus.training_batches(0, 8), corpus.training_batches(1, 8)
    later = one.read(1000, 0, 8)
    for name, value in again.read(1000, 0, 8).items():
        np.testing.assert_array_equal(value, later[name])
    assert (other.read(1000, 0, 8)["inputs"] != later["inputs"]).any()


def test_each_source_is_shuffled_in_an_order_of_its_own(cache, folder, tmp_path, monkeypatch):
    other = write_folder(tmp_path / "other", 60, "land")
    mixed = data.prepare(config(cache, f"folder:{folder}", f"folder:{other}"))
    seeds, shuffle = [], grain.MapDataset.shuffle
    monkeypatch.setattr(
        grain.MapDataset, "shuffle", lambda self, *, seed: seeds.append(seed) or shuffle(self, seed=seed)
    )
    for seed in (0, 1):
        mixed.training_batches(seed, 8)
    assert len(seeds) == len(set(seeds)) == 4


@pytest.mark.parametrize("readers", [1, 2, 4])
def test_the_order_is_the_same_for_any_number_of_readers(corpus, readers):
    share = 8 // readers
    for step in (0, 7):
        parts = [corpus.training_batches(3, 8).read(step, r * share, (r + 1) * share) for r in range(readers)]
        for name, value in corpus.training_batches(3, 8).read(step, 0, 8).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own(corpus):
    n = len(corpus.evaluation_batches("train", 1))
    rows = keys_of_rows(rows_of(corpus.training_batches(0, 1), 0, 2 * n, 1))
    first, second = rows[:n], rows[n:]
    every = Counter(keys_of_rows(rows_of(corpus.evaluation_batches("train", 1), 0, n, 1)))
    assert Counter(first) == Counter(second) == every
    assert first != second


def test_without_a_limit_training_has_no_last_batch(corpus):
    assert len(corpus.training_batches(0, 8)) == sys.maxsize


def test_a_limit_of_epochs_ends_training(cache, folder):
    limited = data.prepare(config(cache, f"folder:{folder}?max_epochs=2"))
    n = len(limited.evaluation_batches("train", 1))
    assert len(limited.training_batches(0, 8)) == 2 * n // 8
    with pytest.raises(IndexError):
        limited.training_batches(0, 8).read(2 * n // 8, 0, 1)


@pytest.fixture(scope="module")
def mixture(cache, folder, tmp_path_factory):
    other = write_folder(tmp_path_factory.mktemp("text") / "land", 40, word="land")
    return cache, f"folder:{folder}?weight=3", f"folder:{other}"


def test_sources_are_mixed_by_weight(mixture):
    cache, sea, land = mixture
    corpus = data.prepare(config(cache, sea, land))
    rows = rows_of(corpus.training_batches(0, 8), 0, 50, 8)
    of_land = [row in stored_keys(corpus, "train", 1) for row in keys_of_rows(rows)]
    assert not stored_keys(corpus, "train", 0) & stored_keys(corpus, "train", 1)
    assert sum(of_land) == 100
    assert {sum(of_land[i : i + 4]) for i in range(0, 400, 4)} == {1}
    assert corpus.split_names == ("train", "validation", "test", "validation_sea", "validation_land")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_limited_source_ends_a_mixture_before_any_row_comes_too_often(mixture, epochs):
    cache, sea, land = mixture
    corpus = data.prepare(config(cache, sea, f"{land}?max_epochs={epochs}"))
    batches = corpus.training_batches(0, 1)
    stored = stored_keys(corpus, "train", 1)
    assert abs(len(batches) - 4 * epochs * stored.total()) <= 4
    seen = Counter(row for row in keys_of_rows(rows_of(batches, 0, len(batches), 1)) if row in stored)
    assert all(count <= epochs * stored[row] for row, count in seen.items())
    assert seen.total() >= epochs * stored.total() - 1


def test_weights_change_what_a_mixtures_validation_is(mixture):
    cache, sea, land = mixture
    prints = [
        data.prepare(config(cache, *sources)).fingerprint
        for sources in (
            (sea, land),
            (sea.replace("weight=3", "weight=6"), land + "?weight=2"),
            (sea.replace("weight=3", "weight=1"), land),
        )
    ]
    assert prints[0] == prints[1] != prints[2]


def test_validation_takes_turns_between_sources_and_has_each_apart(mixture):
    cache, sea, land = mixture
    corpus = data.prepare(config(cache, sea, land))
    sizes = {
        name: len(corpus.evaluation_batches(name, 1)) for name in ("validation", "validation_sea", "validation_land")
    }
    assert sizes["validation"] == sizes["validation_sea"] + sizes["validation_land"]
    first = keys_of_rows(rows_of(corpus.evaluation_batches("validation", 8), 0, 1, 8))
    assert sum(row in stored_keys(corpus, "validation", 1) for row in first) == 2


def test_domains_have_validation_splits_and_the_held_out_one_is_never_trained_on(cache, tmp_path):
    for domain in ("law", "de-AT", "heldout"):
        write_folder(tmp_path / "all" / domain, 60, word=domain)
    corpus = data.prepare(config(cache, f"folder:{tmp_path / 'all'}"))
    assert corpus.split_names == (
        "train", "validation", "test", "heldout_domain", "validation_de_AT", "validation_law"
    )  # fmt: skip
    n = {name: len(corpus.evaluation_batches(name, 1)) for name in corpus.split_names}
    assert n["validation"] == n["validation_de_AT"] + n["validation_law"]
    words = {
        name: "".join(texts_of(corpus, stored_in_order(corpus, name), 1))
        for name in ("train", "heldout_domain", "test")
    }
    assert "heldout" not in words["train"] + words["test"] and "law" not in words["heldout_domain"]
    assert "law" in words["train"] and "de-AT" in words["train"]


def test_reopening_reads_no_text_again(cache, folder, corpus, monkeypatch):
    monkeypatch.setattr("sparse_lm.data.corpus.survey_sources", None)
    again = data.prepare(config(cache, f"folder:{folder}"))
    assert (again.fingerprint, again.parts) == (corpus.fingerprint, corpus.parts)
    assert again.tokenizer.digest == corpus.tokenizer.digest


def test_another_length_has_the_same_tokenizer_and_another_fingerprint(cache, folder, corpus, monkeypatch):
    monkeypatch.setattr(tokenizers, "train", None)
    longer = data.prepare(config(cache, f"folder:{folder}", length=32))
    assert longer.tokenizer.digest == corpus.tokenizer.digest
    assert longer.fingerprint != corpus.fingerprint
    assert longer.training_batches(0, 2).read(0, 0, 2)["inputs"].shape == (2, 32)


def test_the_fingerprint_is_that_of_the_text_not_of_its_place_or_time(folder, corpus, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_text(path.read_text())
    assert data.prepare(config(tmp_path, f"folder:{copy}?max_epochs=9")).fingerprint == corpus.fingerprint
    (copy / "000.txt").write_text("Another text.")
    assert data.prepare(config(tmp_path, f"folder:{copy}")).fingerprint != corpus.fingerprint


def test_a_tokenizer_of_the_users(cache, folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(tokenizers.train(["sea land sea document"] * 9, 270))
    corpus = data.prepare(config(cache, f"folder:{folder}", tokenizer=str(path)))
    assert corpus.tokenizer.file == path.read_bytes()
    made = config(cache, f"folder:{folder}", tokenizer=str(path))
    object.__setattr__(made.model, "vocabulary", 260)
    with pytest.raises(UserError, match="has 270 tokens, more than model.vocabulary=260; .* at least 270"):
        data.prepare(made)


def whole(cache: pathlib.Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.suffix != ".lock" and path.name != "data")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("b.txt", b"\xff", "b.txt: not UTF-8 at byte 0"),
        ("b.jsonl", b"{}", "b.jsonl, line 1: no field 'text'"),
        ("b.txt.gz", b"no", "not a whole gzip file"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, file, content, message):
    folder = write_folder(tmp_path / "sea", 20)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        data.prepare(config(tmp_path / "cache", f"folder:{folder}"))
    assert whole(tmp_path / "cache") == []


def test_an_empty_corpus(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="the corpus is empty"):
        data.prepare(config(tmp_path / "cache", f"folder:{tmp_path}"))


def test_a_remote_cache_is_refused(folder):
    with pytest.raises(UserError, match="must be a local or mounted folder"):
        data.prepare(config("gs://bucket/cache", f"folder:{folder}"))


def test_text_that_changes_while_it_is_read(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "sea", 20)

    def write(*args):
        real(*args)
        (folder / "new.txt").write_text("just now")

    real = store.write_rows
    monkeypatch.setattr("sparse_lm.data.corpus.write_rows", write)
    with pytest.raises(UserError, match="sea was changed while it was read"):
        data.prepare(config(tmp_path / "cache", f"folder:{folder}"))
    assert not any("rows" in name for name in whole(tmp_path / "cache"))


PREPARE = """
import pathlib, sys
sys.path.insert(0, {tests!r})
from tests.data.texts import config
from sparse_lm import data
{before}
try:
    print(data.prepare(config(pathlib.Path({cache!r}), "folder:{folder}")).fingerprint)
except OSError as e:
    print("errno", e.errno)
"""


def start(cache, folder, before=""):
    code = PREPARE.format(tests=str(pathlib.Path(__file__).parent), cache=str(cache), folder=folder, before=before)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


KILLED_AT_THE_END = """
import os, signal
from sparse_lm.data import corpus
real = corpus.write_rows
def write(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
corpus.write_rows = write
"""


def test_a_killed_preparation_is_not_taken_for_a_whole_one(folder, corpus, tmp_path):
    killed = start(tmp_path, folder, KILLED_AT_THE_END)
    assert killed.communicate()[0] == "" and killed.returncode == -9
    assert any(name.startswith(".rows") for name in whole(tmp_path))
    assert not any(name.startswith("rows") for name in whole(tmp_path))
    assert data.prepare(config(tmp_path, f"folder:{folder}")).fingerprint == corpus.fingerprint
    assert not any(name.startswith(".rows") for name in whole(tmp_path))


def test_two_processes_at_once_make_one_corpus(folder, corpus, tmp_path):
    both = [start(tmp_path, folder) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == [corpus.fingerprint] * 2
    assert [name.startswith(".") for name in whole(tmp_path)].count(True) == 0


WITHOUT_LOCKS = """
from sparse_lm.data import cache
def flock(file, how):
    raise OSError("no locks here")
cache.fcntl.flock = flock
cache.socket.gethostname = lambda: {host!r}
"""


def test_two_machines_without_locks_do_not_spoil_each_others_work(folder, corpus, tmp_path):
    both = [start(tmp_path, folder, WITHOUT_LOCKS.format(host=host)) for host in ("a", "b")]
    assert [process.communicate()[0].strip() for process in both] == [corpus.fingerprint] * 2
    assert [name.startswith(".") for name in whole(tmp_path)].count(True) == 0


FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


@pytest.mark.parametrize("limit", [300, 12_000])
def test_a_disk_that_refuses_to_write_more_leaves_nothing_that_looks_whole(folder, tmp_path, limit):
    # A limit on the size of files makes the same calls fail as a full disk does: first the tokenizer, then the rows.
    process = start(tmp_path, folder, FULL_DISK.format(limit=limit))
    assert process.communicate()[0].strip() == f"errno {errno.EFBIG}"
    assert not any("rows" in name for name in whole(tmp_path))


def test_the_stored_rows_are_a_tfds_data_set(cache, folder, corpus):
    import tensorflow_datasets as tfds

    (description,) = [
        p for p in (cache / "data").glob("rows-*/corpus.json") if json.loads(p.read_text())["parts"] == corpus.parts
    ]
    builder = tfds.builder_from_directory(description.parent)
    assert {name: split.num_examples for name, split in builder.info.splits.items()} == {
        f"{part['kind']}_{i}": part["rows"] for i, part in enumerate(corpus.parts)
    }
    assert "tensorflow" not in sys.modules
