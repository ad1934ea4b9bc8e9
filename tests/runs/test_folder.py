import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from sparse_lm.config import Config, choice, resolve
from sparse_lm.errors import UserError
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.folder import RunFolder, Table, read_config, read_evaluation_rows, read_rows, read_summary

INFO = {"versions": {"jax": "1"}, "fingerprint": "abc", "devices": ["cpu"]}


def config(**model) -> Config:
    c = Config()
    for name, value in model.items():
        setattr(c.model, name, value)
    return resolve(c)


def test_stores_the_config_so_that_it_comes_back(tmp_path):
    c = config(experts=4, capacity_factor=math.inf, router=choice("switch", jitter=0.1, top=math.inf))
    with RunFolder(tmp_path / "a" / "run", c, INFO) as folder:
        assert not folder.continued
    text = (tmp_path / "a" / "run" / "config.json").read_text()
    stored = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read_config(tmp_path / "a" / "run") == c
    assert stored.pop("config")["model"]["capacity_factor"] == math.inf and stored == INFO
    assert sorted(p.name for p in (tmp_path / "a" / "run").iterdir()) == [".lock", "config.json"]


def test_free_fields_may_change_on_the_way(tmp_path):
    RunFolder(tmp_path, config(), INFO).close()
    longer = Config()
    longer.training.steps, longer.mesh.fsdp, longer.logging.every = 77, 2, 3
    with RunFolder(tmp_path, resolve(longer), INFO | {"devices": ["tpu"]}) as folder:
        assert folder.continued and read_config(tmp_path) == config()
        folder.rewind(0)
    assert read_config(tmp_path) == resolve(longer)
    assert json.loads((tmp_path / "config.json").read_text())["devices"] == ["tpu"]


def test_another_identity_is_refused_with_the_differences(tmp_path):
    RunFolder(tmp_path, config(), INFO).close()
    before = (tmp_path / "config.json").read_text()
    other = Config()
    other.model.experts, other.training.seed = 8, 3
    with pytest.raises(UserError) as error:
        RunFolder(tmp_path, resolve(other), INFO)
    assert str(error.value) == (
        f"{tmp_path} holds a run of another kind: model.experts is 0 there and 8 here, "
        "training.seed is 0 there and 3 here; choose another --workdir"
    )
    other.model.width, other.model.layers, other.model.heads, other.data.length = 64, 6, 2, 128
    with pytest.raises(UserError, match=r"(there and .* here.*){6}, and \d+ more; choose"):
        RunFolder(tmp_path, resolve(other), INFO)
    router = config(router=choice("switch", jitter=0.5))
    with pytest.raises(UserError, match="model.router.options.jitter is unset there and 0.5 here"):
        RunFolder(tmp_path, router, INFO)
    assert (tmp_path / "config.json").read_text() == before
    RunFolder(tmp_path, config(), INFO).close()  # nobody holds it


def test_other_data_is_refused(tmp_path):
    RunFolder(tmp_path, config(), INFO).close()
    with pytest.raises(UserError, match="on other data .its fingerprint is abc there and xyz here"):
        RunFolder(tmp_path, config(), INFO | {"fingerprint": "xyz"})


HOLD = """
import sys, time
from sparse_lm.config import Config, resolve
from sparse_lm.runs.folder import RunFolder
folder = RunFolder(sys.argv[1], resolve(Config()), {"fingerprint": "abc"})
print("held", flush=True)
time.sleep(60)
"""


def test_a_living_process_keeps_others_out_and_a_killed_one_does_not(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {child.pid} on .*; wait for it"):
            RunFolder(tmp_path, config(), INFO)
        RunFolder(tmp_path, config(), INFO, primary=False).close()
        assert read_config(tmp_path) == config()
        child.send_signal(signal.SIGKILL)
    with RunFolder(tmp_path, config(), INFO) as folder:
        assert folder.continued
        assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_others_than_the_primary_write_nothing(tmp_path):
    with RunFolder(tmp_path / "run", config(), INFO, primary=False) as folder:
        folder.append("metrics", {"step": 1})
        folder.rewind(0)
        folder.finish({}, {})
    assert not (tmp_path / "run").exists()


def test_a_place_that_can_not_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"{path} can't be made a run's folder"):
            RunFolder(path, config(), INFO)


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(UserError, match="no run in .*nowhere: it does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it has no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"config": {"name": 3}}')
    with pytest.raises(UserError, match="config.json: name is 3; it must be of type str"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        read_config(tmp_path)
    assert read_rows(tmp_path, "metrics") == [] and read_summary(tmp_path) is None


def test_rows_are_there_at_once_and_always_valid_json(tmp_path):
    with RunFolder(tmp_path, config(), INFO) as folder:
        row = {"step": np.int64(1), "loss": jnp.float32(2.5), "norm": math.nan, "top": np.float32(np.inf), "split": "ü"}
        folder.append("eval", row)
        text = (tmp_path / "eval.jsonl").read_text()
        assert json.loads(text, parse_constant=pytest.fail) == folder.rows("eval")[0]
    assert read_rows(tmp_path, "eval") == [{"step": 1, "loss": 2.5, "norm": None, "top": None, "split": "ü"}]


@pytest.mark.parametrize("parts", [False, True])
def test_rewinding_removes_later_rows_and_a_torn_one(tmp_path, parts):
    table = Table(epath.Path(tmp_path), "metrics", parts=parts)
    for step in range(1, 251):
        table.append({"step": step, "loss": 1 / step})
    table.close()
    if not parts:
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 251, "lo')
    assert [row["step"] for row in read_rows(tmp_path, "metrics")] == list(range(1, 251))
    table = Table(epath.Path(tmp_path), "metrics", parts=parts)  # another process
    table.rewind(120)
    for step in range(121, 131):
        table.append({"step": step, "again": True})
    table.rewind(125)
    table.append({"step": 126})
    table.close()
    rows = read_rows(tmp_path, "metrics")
    assert [row["step"] for row in rows] == list(range(1, 127))
    assert rows[119] == {"step": 120, "loss": 1 / 120} and rows[124] == {"step": 125, "again": True}
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == (
        ["metrics-00000000.jsonl", "metrics-00000100.jsonl", "metrics-00000120.jsonl", "metrics-00000125.jsonl"]
        if parts
        else ["metrics.jsonl"]
    )


def test_parts_of_one_step_do_not_replace_each_other(tmp_path):
    table = Table(epath.Path(tmp_path), "eval", parts=True)
    for split in ("validation", "heldout_domain"):
        table.append({"step": 100, "split": split})
        assert len(read_rows(tmp_path, "eval")) == (split != "validation")  # not stored yet
        table.flush()
    assert [row["split"] for row in read_rows(tmp_path, "eval")] == ["validation", "heldout_domain"]


def test_rewinding_to_the_start_leaves_no_rows(tmp_path):
    with RunFolder(tmp_path, config(), INFO) as folder:
        folder.append("metrics", {"step": 1})
        folder.append("eval", {"step": 1})
        folder.rewind(0)
        assert folder.rows("metrics") == folder.rows("eval") == []
        folder.append("metrics", {"step": 1})
        assert folder.rows("metrics") == [{"step": 1}]


def test_a_line_that_is_not_json_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st{"step": 2}\n{"step": 3}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 2, is not JSON"):
        read_rows(tmp_path, "metrics")


def test_the_summary_marks_a_finished_run_until_it_goes_on(tmp_path):
    with RunFolder(tmp_path, config(), INFO) as folder:
        assert folder.summary() is None
        folder.finish({"loss": np.float32(1.5), "speedup": math.inf}, {"validation": {"tokens": np.arange(3)}})
    assert read_summary(tmp_path) == {"loss": 1.5, "speedup": None}
    assert read_evaluation_rows(tmp_path)["validation"]["tokens"].tolist() == [0, 1, 2]
    with RunFolder(tmp_path, config(), INFO) as folder:
        assert folder.summary() == {"loss": 1.5, "speedup": None}
        folder.rewind(5)
        assert folder.summary() is None and read_evaluation_rows(tmp_path) == {}


def test_a_run_that_fails_before_it_begins_leaves_no_folder(tmp_path):
    for name, rows in (("none", 0), ("some", 1)):
        with pytest.raises(UserError), RunFolder(tmp_path / name, config(), INFO) as folder:
            for step in range(rows):
                folder.append("metrics", {"step": step})
            raise UserError("no")
    assert [p.name for p in tmp_path.iterdir()] == ["some"]
    with pytest.raises(UserError), RunFolder(tmp_path / "some", config(), INFO):
        raise UserError("no")
    assert read_config(tmp_path / "some") == config()


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"null", b"3", b"[" * 100_000, b"{"])
def test_a_damaged_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "row", [b"\xff", b"[]", b"null", b'{"loss": 3.0}', b'{"step": "3"}', b'{"step": 1.5}', b"[" * 100_000]
)
def test_a_damaged_row_is_named(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + row + b"\n")
    with pytest.raises(UserError, match="metrics.jsonl(, line 2,)? is no"):
        read_rows(tmp_path, "metrics")


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "eval-00000100.jsonl", "summary.json"])
def test_parts_of_a_run_without_its_config_are_no_new_run(tmp_path, left):
    (tmp_path / left).mkdir() if left == "checkpoints" else (tmp_path / left).write_text("")
    with pytest.raises(UserError, match=f"has {left} of a run whose config.json is gone; bring that back, or choose"):
        RunFolder(tmp_path, config(), INFO)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", left])


@pytest.mark.parametrize("name", [".lock", ".config.json.tmp", "metrics.jsonl", "summary.json", "config.json"])
def test_links_that_lead_out_of_the_folder_are_not_written_through(tmp_path, name):
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    RunFolder(run, config(), INFO).close()
    theirs.write_text((run / "config.json").read_text())
    before = theirs.read_bytes()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(theirs)
    with pytest.raises(UserError, match=f"run/{name} is a symbolic link"):
        RunFolder(run, config(), INFO)
    assert theirs.read_bytes() == before


def test_checkpoints_may_be_on_another_disk(tmp_path):
    RunFolder(tmp_path / "run", config(), INFO).close()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    RunFolder(tmp_path / "run", config(), INFO).close()


def test_the_home_is_one_folder_for_all_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with RunFolder("~/run", config(), INFO) as folder:
        assert folder.checkpoints == tmp_path / "run/checkpoints"
        assert read_config("~/run") == config()
        with Checkpoints("~/run/checkpoints") as checkpoints:
            checkpoints.save(1, {"a": {"w": np.ones(3, np.float32)}}, {})
    assert (tmp_path / "run/checkpoints/1").exists()


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    RunFolder(tmp_path, config(), INFO).close()
    before = sorted((p.name, p.read_text()) for p in tmp_path.iterdir())

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with RunFolder(tmp_path, config(), INFO) as folder:
        monkeypatch.setattr(type(folder.path), "replace", full)
        with pytest.raises(OSError, match="No space left"):
            folder.finish({"loss": 1.0}, {})
    assert sorted((p.name, p.read_text()) for p in tmp_path.iterdir()) == before
