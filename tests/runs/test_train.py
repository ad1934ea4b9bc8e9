"""The main job on a small text: training, continuing, comparing, replaying."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm import runs
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.mesh import make_mesh
from sparse_lm.runs import replay
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.folder import RunFolder, read_evaluation_rows, read_rows
from sparse_lm.runs.measures import final_rows
from sparse_lm.runs.train import _log_executor
from sparse_lm.scaling.compare import compare
from tests import tiny

STEPS = 12


@pytest.fixture
def run(trained, tmp_path):
    """A finished run of `config()`, which may be changed."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_leaves_its_measures(trained):
    summary = json.loads((trained / "summary.json").read_text())
    rows = read_rows(trained, "metrics")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = "tokens loss cross_entropy balance_loss z_loss grad_norm learning_rate tokens_per_second data_wait"
    health = "load_max load_cv dead_experts dropped entropy logit_rms top_probability"
    assert {*wanted.split(), *(f"routing/1/{name}" for name in health.split())} <= set(rows[-1])
    assert rows[-1]["loss"] < rows[0]["loss"]
    evaluated = read_rows(trained, "eval")
    assert [(row["step"], row["split"]) for row in evaluated] == [(6, "validation"), (12, "validation")]
    assert summary["evaluation"]["validation"]["loss"] == evaluated[-1]["loss"]
    stored = json.loads((trained / "config.json").read_text())
    assert stored["versions"]["jax"] == jax.__version__ and stored["devices"]["platform"] == "cpu"
    assert stored["fingerprint"] == summary["fingerprint"]
    assert summary["steps"] == STEPS and 0 < summary["goodput"] <= 1


def test_the_evaluation_that_ends_a_run_takes_more_rows_and_keeps_them(config, tmp_path):
    run, longer = tmp_path / "run", {"evaluation__rows": 3, "evaluation__final_rows": 7}
    summary = runs.train(config(**longer, training__steps=6), run)["evaluation"]["validation"]
    rows = read_evaluation_rows(run)["validation"]
    mean = lambda n: rows["cross_entropy"][:n].sum(dtype=np.float64) / rows["tokens"][:n].sum()
    assert summary["rows"] == len(rows["tokens"]) == 7 and summary["tokens"] == rows["tokens"].sum()
    assert summary["loss"] == pytest.approx(mean(7), rel=1e-12)
    curve = read_rows(run, "eval")
    assert curve[-1]["rows"] == 3 and curve[-1]["loss"] == pytest.approx(mean(3), rel=1e-6)
    assert len({*map(tuple, rows["place"].tolist())}) == 7 and (rows["place"][:, 0] == rows["place"][0, 0]).all()
    assert runs.evaluate(run)["evaluation"]["validation"] == pytest.approx(summary, rel=1e-6)
    runs.train(config(**longer), run)
    assert (read_evaluation_rows(run)["validation"]["cross_entropy"] != rows["cross_entropy"]).all()


@pytest.mark.parametrize(("rows", "final", "taken"), [(3, 7, 7), (7, 3, 7), (0, 3, 0), (3, 0, 0)])
def test_no_fewer_rows_are_taken_at_the_end(rows, final, taken):
    assert final_rows(configs.Evaluation(rows=rows, final_rows=final)) == taken


@pytest.mark.parametrize(
    "router",
    [
        configs.choice("deepseek"),
        configs.choice("hash", balanced=True),  # deals its table in step 10, when it has seen 8 · 300 tokens
    ],
    ids=lambda router: router.name,
)
def test_a_continued_run_is_the_uninterrupted_one(config, tmp_path, router):
    fields = {"model__router": router, "training__batch": 16, "optimizer__schedule": configs.choice("constant")}
    runs.train(config(**fields), tmp_path / "whole")
    runs.train(config(**fields, training__steps=7), tmp_path / "other")
    runs.train(config(**fields), tmp_path / "other")  # the length may change on the way
    whole, other = (runs.load(f"{tmp_path}/{name}") for name in ("whole", "other"))
    tiny.equal((other.parameters, other.router), (whole.parameters, whole.router))
    strip = lambda rows: [{k: row[k] for k in ("step", "loss", "grad_norm", "tokens")} for row in rows]
    assert strip(read_rows(tmp_path / "other", "metrics")) == strip(read_rows(tmp_path / "whole", "metrics"))
    begun = whole.program.functional.init_router_state()
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (begun, whole.router)), strict=True))


def test_a_run_says_how_much_room_an_exchange_takes(caplog):
    caplog.set_level("INFO", "sparse_lm")
    mesh = make_mesh(configs.Mesh(data=1, expert=8), jax.devices()[:1] * 8)
    for buffer in (math.inf, 2.0):
        _log_executor(tiny.config(model__experts=8, model__exchange_buffer=buffer).model, mesh)
    (said,) = [line for line in caplog.messages if "room" in line]
    assert said.startswith("each device has room for all rows of the 8 that exchange theirs; a model.exchange_buffer")


def test_what_a_run_says_of_its_routing(config, tmp_path, caplog):
    """Under a capacity in training alone: 8 · 5 places for 2 · 16 choices, in evaluation 8 · 16."""
    caplog.set_level("INFO", "sparse_lm")
    runs.train(config(model__router=configs.choice("topk"), model__experts=8, model__top_k=2), tmp_path / "run")
    drops = "at a capacity factor of {}, tokens lose their places to later ones"
    assert "experts are computed by grouped in training, by grouped in evaluation" in caplog.messages
    assert f"in training the routing looks ahead: {drops.format(1.25)}" in caplog.messages
    for factor, leak in ((None, ""), (1.0, drops.format(1))):
        found = runs.evaluate(str(tmp_path / "run"), capacity_factor=factor)
        assert found["leak"] == leak and found["evaluation"]["validation"]["causal"] == (not leak)
    caplog.clear()
    runs.train(config(model__executor="gather"), tmp_path / "switch")
    assert not [line for line in caplog.messages if "looks ahead" in line or "are computed by" in line]


def test_a_finished_run_is_left_alone(config, run):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for steps in (12, 6):
        assert runs.train(config(training__steps=steps), run) == json.loads(before[run / "summary.json"])
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_another_identity_is_refused_and_a_free_field_is_not(config, tmp_path):
    runs.train(config(training__steps=6), tmp_path / "run")
    with pytest.raises(UserError, match="model.experts is 4 there and 2 here"):
        runs.train(config(model__experts=2), tmp_path / "run")
    assert runs.train(config(training__accumulation=2), tmp_path / "run")["steps"] == STEPS


def test_a_run_that_lost_its_summary_writes_it_again(config, run):
    first = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    again = runs.train(config(), run)
    assert again["evaluation"] == first["evaluation"] and again["tokens"] == first["tokens"]
    assert again["data_wait"] >= first["data_wait"] > 0  # what the first process waited counts
    assert len(read_rows(run, "eval")) == 2
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="has 12 steps already"):
        runs.train(config(training__steps=6), run)


def test_too_many_skipped_steps_end_the_run(config, tmp_path):
    bad = config(optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, training__max_skipped=3, training__steps=30)
    with pytest.raises(RunFailed, match="3 times in a row"):
        runs.train(bad, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize("every", [1, 6])
def test_nothing_more_is_written_to_a_folder_that_another_process_has_taken(config, tmp_path, monkeypatch, every):
    """Which is known after the evaluation of step 2: neither its checkpoint nor a row of step 3 follows."""
    monkeypatch.setattr(RunFolder, "lost", property(lambda self: "process 7 holds it now" if self.rows("eval") else ""))
    fields = {"evaluation__every": 2, "checkpoints__every": every, "training__steps": 6, "checkpoints__keep": 9}
    with pytest.raises(RunFailed, match="process 7 holds it now"):
        runs.train(config(**fields), tmp_path / "run")
    assert [row["step"] for row in read_rows(tmp_path / "run", "metrics")] == [1, 2]
    assert Checkpoints(tmp_path / "run/checkpoints").steps() == ([1] if every == 1 else [])
    assert not (tmp_path / "run/summary.json").exists()


def test_a_comparison_of_two_seeds(config, tmp_path):
    result = compare(config(), runs.train, str(tmp_path / "compare"), seeds=2)
    assert {"comparison.json", "comparison.md", "comparison.png"} <= {p.name for p in (tmp_path / "compare").iterdir()}
    assert result["sparse"]["total_params"] > result["dense"]["total_params"]
    step = lambda side: read_rows(tmp_path / f"compare/{side}-seed0", "metrics")[0]["tokens"]
    assert step("sparse") == step("dense")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replay_repeats_a_step_of_the_run(config, run, accumulation, tmp_path):
    if accumulation > 1:
        run = tmp_path / "accumulated"
        runs.train(config(training__accumulation=accumulation), run)
    replayed = replay.replay(str(run), 7)
    assert replayed.row["loss"] == pytest.approx(replayed.logged["loss"], rel=1e-5)
    valid = replayed.batch["segments"] > 0
    assert (replayed.experts[1][..., 0][~valid] == -1).all() and (replayed.experts[1][valid] >= 0).all()
    mean = replayed.token_losses.sum() / valid.sum()
    assert mean == pytest.approx(replayed.row["cross_entropy"], rel=1e-5)
    assert "run again" in replay.describe(replayed)
    with pytest.raises(UserError, match="steps 1 to 12"):
        replay.replay(str(run), 13)
