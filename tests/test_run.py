"""The main job on a small text: training, continuing, comparing, replaying."""

import json
import math
import pathlib
import random

import jax
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm import replay, run
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.mesh import make_mesh
from sparse_lm.scaling.compare import compare
from sparse_lm.training.checkpoints import Checkpoints
from sparse_lm.training.run_folder import read_info, read_rows
from tests import tiny

STEPS = 12


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> pathlib.Path:
    """A folder of 200 texts of random words, and its cache beside it."""
    folder = tmp_path_factory.mktemp("text")
    words = "the cat sat on a mat and then went away to see what other cats do all day long".split()
    draw = random.Random(0)
    for i in range(200):
        (folder / f"{i}.txt").write_text(" ".join(draw.choices(words, k=60)))
    return folder


@pytest.fixture
def config(text):
    def make(**fields):
        made = tiny.config(
            **{
                "model__vocabulary": 300,
                "model__experts": 4,
                "training__steps": STEPS,
                "evaluation__every": 6,
                "evaluation__rows": 8,
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


def parameters(workdir, program_of) -> dict:
    with Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        step = checkpoints.steps()[-1]
    loaded = run.load(str(workdir), step)
    return jax.device_get(loaded.parameters)


def test_a_run_leaves_its_measures(config, tmp_path):
    summary = run.train(config(), tmp_path / "run")
    rows = read_rows(tmp_path / "run", "metrics")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    wanted = "tokens loss cross_entropy balance_loss z_loss grad_norm learning_rate tokens_per_second data_wait"
    health = "load_max load_cv dead_experts dropped entropy logit_rms top_probability"
    assert {*wanted.split(), *(f"routing/1/{name}" for name in health.split())} <= set(rows[-1])
    assert rows[-1]["loss"] < rows[0]["loss"]
    evaluated = read_rows(tmp_path / "run", "eval")
    assert [(row["step"], row["split"]) for row in evaluated] == [(6, "validation"), (12, "validation")]
    assert summary["evaluation"]["validation"]["loss"] == evaluated[-1]["loss"]
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored["versions"]["jax"] == jax.__version__ and stored["devices"]["platform"] == "cpu"
    assert stored["fingerprint"] == summary["fingerprint"]
    assert summary["steps"] == STEPS and 0 < summary["goodput"] <= 1


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
    run.train(config(**fields), tmp_path / "whole")
    run.train(config(**fields, training__steps=7), tmp_path / "other")
    run.train(config(**fields), tmp_path / "other")  # the length may change on the way
    whole, other = (run.load(f"{tmp_path}/{name}") for name in ("whole", "other"))
    tiny.equal((other.parameters, other.router), (whole.parameters, whole.router))
    strip = lambda rows: [{k: row[k] for k in ("step", "loss", "grad_norm", "tokens")} for row in rows]
    assert strip(read_rows(tmp_path / "other", "metrics")) == strip(read_rows(tmp_path / "whole", "metrics"))
    begun = whole.program.functional.init_router_state()
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (begun, whole.router)), strict=True))


def test_a_run_says_how_much_room_an_exchange_takes(caplog):
    caplog.set_level("INFO", "sparse_lm")
    mesh = make_mesh(configs.Mesh(data=1, expert=8), jax.devices()[:1] * 8)
    for buffer in (math.inf, 2.0):
        run._log_executor(tiny.config(model__experts=8, model__exchange_buffer=buffer).model, mesh)
    (said,) = [line for line in caplog.messages if "room" in line]
    assert said.startswith("each device has room for all rows of the 8 that exchange theirs; a model.exchange_buffer")


def test_what_a_run_says_of_its_routing(config, tmp_path, caplog):
    """Under a capacity in training alone: 8 · 5 places for 2 · 16 choices, in evaluation 8 · 16."""
    caplog.set_level("INFO", "sparse_lm")
    run.train(config(model__router=configs.choice("topk"), model__experts=8, model__top_k=2), tmp_path / "run")
    drops = "at a capacity factor of {}, tokens lose their places to later ones"
    assert "experts are computed by grouped in training, by grouped in evaluation" in caplog.messages
    assert f"in training the routing looks ahead: {drops.format(1.25)}" in caplog.messages
    for factor, leak in ((None, ""), (1.0, drops.format(1))):
        found = run.evaluate(str(tmp_path / "run"), capacity_factor=factor)
        assert found["leak"] == leak and found["evaluation"]["validation"]["causal"] == (not leak)
    caplog.clear()
    run.train(config(model__executor="gather"), tmp_path / "switch")
    assert not [line for line in caplog.messages if "looks ahead" in line or "are computed by" in line]


def test_a_finished_run_is_left_alone(config, tmp_path, caplog):
    first = run.train(config(), tmp_path / "run")
    assert run.train(config(), tmp_path / "run") == first


def test_another_identity_is_refused_and_a_free_field_is_not(config, tmp_path):
    run.train(config(training__steps=6), tmp_path / "run")
    with pytest.raises(UserError, match="model.experts is 4 there and 2 here"):
        run.train(config(model__experts=2), tmp_path / "run")
    assert run.train(config(training__accumulation=2), tmp_path / "run")["steps"] == STEPS


def test_a_run_begins_with_the_parameters_of_another(config, tmp_path):
    run.train(config(), tmp_path / "first")
    frozen = {"optimizer__learning_rate": 1e-12, "training__seed": 5, "optimizer__weight_decay": 0.0}
    run.train(config(training__steps=6, **frozen), tmp_path / "second", f"{tmp_path}/first@12")
    tiny.close(parameters(tmp_path / "second", config), parameters(tmp_path / "first", config), 1e-6)
    with pytest.raises(UserError, match="saved steps 4|8, 12"):
        run.train(config(training__steps=6), tmp_path / "third", f"{tmp_path}/first@5")


def test_a_run_on_other_text_keeps_the_tokenizer_of_the_run_it_began_from(config, tmp_path):
    """Other text would train another tokenizer, in which the parameters' rows mean other tokens."""
    (tmp_path / "other").mkdir()
    for i in range(50):
        (tmp_path / f"other/{i}.txt").write_text(f"quite different words {i} here " * 10)
    run.train(config(), tmp_path / "first")
    other = {"data__sources": (f"folder:{tmp_path}/other",), "training__steps": 6}
    run.train(config(**other), tmp_path / "second", f"{tmp_path}/first")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert read_info(tmp_path / "second")["init_from"] == f"{tmp_path}/first@12"
    run.train(config(**other | {"training__steps": 8}), tmp_path / "second")  # what it began from is remembered
    assert replay.replay(str(tmp_path / "second"), 2).row["loss"] == pytest.approx(
        read_rows(tmp_path / "second", "metrics")[1]["loss"], rel=1e-5
    )
    with pytest.raises(UserError, match="began from"):
        run.train(config(**other | {"training__steps": 9}), tmp_path / "second", f"{tmp_path}/second")


def test_a_run_that_lost_its_summary_writes_it_again(config, tmp_path):
    first = run.train(config(), tmp_path / "run")
    (tmp_path / "run/summary.json").unlink()
    again = run.train(config(), tmp_path / "run")
    assert again["evaluation"] == first["evaluation"] and again["tokens"] == first["tokens"]
    assert len(read_rows(tmp_path / "run", "eval")) == 2
    (tmp_path / "run/summary.json").unlink()
    with pytest.raises(UserError, match="has 12 steps already"):
        run.train(config(training__steps=6), tmp_path / "run")


def test_a_finished_run_keeps_its_config(config, tmp_path):
    run.train(config(), tmp_path / "run")
    before = (tmp_path / "run/config.json").read_text()
    run.train(config(training__steps=6), tmp_path / "run")
    assert (tmp_path / "run/config.json").read_text() == before


def test_too_many_skipped_steps_end_the_run(config, tmp_path):
    bad = config(optimizer__learning_rate=1e30, optimizer__clip_norm=0.0, training__max_skipped=3, training__steps=30)
    with pytest.raises(RunFailed, match="3 times in a row"):
        run.train(bad, tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()


def test_a_comparison_of_two_seeds(config, tmp_path):
    result = compare(config(), run.train, str(tmp_path / "compare"), seeds=2)
    assert {"comparison.json", "comparison.md", "comparison.png"} <= {p.name for p in (tmp_path / "compare").iterdir()}
    assert result["sparse"]["total_params"] > result["dense"]["total_params"]
    step = lambda side: read_rows(tmp_path / f"compare/{side}-seed0", "metrics")[0]["tokens"]
    assert step("sparse") == step("dense")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_replay_repeats_a_step_of_the_run(config, tmp_path, accumulation):
    run.train(config(training__accumulation=accumulation), tmp_path / "run")
    replayed = replay.replay(str(tmp_path / "run"), 7)
    assert replayed.row["loss"] == pytest.approx(replayed.logged["loss"], rel=1e-5)
    valid = replayed.batch["segments"] > 0
    assert (replayed.experts[1][..., 0][~valid] == -1).all() and (replayed.experts[1][valid] >= 0).all()
    mean = replayed.token_losses.sum() / valid.sum()
    assert mean == pytest.approx(replayed.row["cross_entropy"], rel=1e-5)
    assert "run again" in replay.describe(replayed)
    with pytest.raises(UserError, match="steps 1 to 12"):
        replay.replay(str(tmp_path / "run"), 13)


def test_evaluation_repeats_the_last_row(config, tmp_path):
    run.train(config(), tmp_path / "run")
    again = run.evaluate(str(tmp_path / "run"))
    last = read_rows(tmp_path / "run", "eval")[-1]
    assert again["step"] == STEPS
    assert again["evaluation"]["validation"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert np.isfinite(again["evaluation"]["validation"]["bits_per_byte"])
    at_training = run.evaluate(str(tmp_path / "run"), capacity_factor=1.25)["evaluation"]["validation"]
    assert at_training["loss"] == at_training["loss_train_capacity"]
    assert at_training["loss"] == pytest.approx(last["loss_train_capacity"], rel=1e-6)
