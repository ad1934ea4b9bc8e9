import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparse_lm import cost
from sparse_lm.config import choice
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.scaling.compare import compare, compare_runs
from sparse_lm.scaling.report import format_summary
from tests.scaling.fabricated import Trainer, config, store


def falling(sparse=1.0, noise=0.0):
    """A dense model's loss falls from 5 to 3 in equal steps, a sparse one's `sparse` times as fast; noise of seeds."""

    def loss(config, split, step):
        speed = sparse if config.model.experts else 1.0
        shift = noise * config.training.seed * (-1 if config.model.experts else 1) ** config.training.seed
        return 5 - speed * 2 * step / config.training.steps + shift + (split == "heldout_domain")

    return loss


def test_both_sides_see_the_same_seeds_and_take_turns(tmp_path):
    train = Trainer(falling())
    compare(config(training__seed=7), train, str(tmp_path), seeds=3)
    order = [Path(folder).name for _, folder in train.calls]
    assert order == ["dense-seed0", "sparse-seed0", "sparse-seed1", "dense-seed1", "dense-seed2", "sparse-seed2"]
    assert [c.training.seed for c, _ in train.calls] == [7, 7, 8, 8, 9, 9]
    assert {c.model.experts for c, folder in train.calls if "dense" in folder} == {0}


def test_a_model_twice_as_fast_has_a_speedup_of_two(tmp_path):
    result = compare(config(), Trainer(falling(sparse=2.0)), str(tmp_path))
    assert result["step_speedup"] == pytest.approx(2)
    assert result["time_speedup"] == pytest.approx(2)
    dense, sparse = result["dense"], result["sparse"]
    of_flops = dense["train_flops_per_token"] / sparse["train_flops_per_token"]
    assert result["flops_speedup"] == pytest.approx(2 * of_flops)
    assert (dense["validation_loss"], sparse["validation_loss"]) == pytest.approx((3, 1))
    assert (dense["heldout_domain_loss"], sparse["heldout_domain_loss"]) == pytest.approx((4, 2))
    assert (result["decides"], result["verdict"]) == ("validation", "one seed: not judged")


def test_seconds_are_those_of_each_side(tmp_path):
    a, b = config(), cost.dense_twin(config())
    store(a, tmp_path / "sparse", falling(sparse=2.0), step_seconds=0.4)
    store(b, tmp_path / "dense", falling(), step_seconds=0.1)
    result = compare_runs(str(tmp_path / "sparse"), str(tmp_path / "dense"), price_per_hour=36.0)
    assert result["sides"] == ["dense", "sparse"]  # the dense run is the baseline in whichever order they are named
    assert result["step_speedup"] == pytest.approx(2) and result["time_speedup"] == pytest.approx(0.5)
    assert (result["dense"]["seconds"], result["sparse"]["seconds"]) == pytest.approx((10, 40))
    assert (result["dense"]["cost"], result["sparse"]["cost"]) == pytest.approx((0.1, 0.4))


def test_speedups_are_null_where_the_loss_is_not_reached(tmp_path):
    result = compare(config(), Trainer(falling(sparse=0.9)), str(tmp_path))
    assert [result[f"{name}_speedup"] for name in ("step", "time", "flops")] == [None, None, None]
    assert json.loads((tmp_path / "comparison.json").read_text())["step_speedup"] is None


def test_one_seed_that_does_not_reach_it_makes_the_speedup_null(tmp_path):
    loss = lambda c, split, step: falling(sparse=2.0 if c.training.seed == 0 else 0.5)(c, split, step)
    result = compare(config(), Trainer(loss), str(tmp_path), seeds=2)
    assert result["step_speedup"] is None and result["step_speedup_per_seed"] == [pytest.approx(2), None]
    assert "reaches the dense model's final validation loss in 1 of 2 seeds" in (tmp_path / "comparison.md").read_text()


def test_differences_are_paired_by_seed(tmp_path):
    # Seeds move both sides by 1 nat and the difference by nothing: unpaired, the noise would hide it.
    loss = lambda c, split, step: 3 + c.training.seed - (0.05 + 0.001 * c.training.seed) * (c.model.experts > 0)
    result = compare(config(), Trainer(loss), str(tmp_path), seeds=3)
    change = result["differences"]["validation"]
    assert change["per_seed"] == pytest.approx([-0.05, -0.051, -0.052])
    half = 4.30265273 * 0.001 / math.sqrt(3)
    assert change["interval"] == pytest.approx([-0.051 - half, -0.051 + half])
    assert result["verdict"] == "better"
    wide = 4.30265273 / math.sqrt(3)
    assert result["dense"]["validation_loss_interval"] == pytest.approx([4 - wide, 4 + wide])


def test_noise_between_seeds_is_no_difference(tmp_path):
    result = compare(config(), Trainer(falling(noise=0.1)), str(tmp_path), seeds=3)
    assert result["verdict"] == "no difference seen"


def test_noise_of_text_is_no_difference(tmp_path):
    """The sparse model is better by 0.05 in every seed, and by 1 more or less in single rows, as in every seed."""
    loss = lambda c, split, step: 3 + c.training.seed - (0.05 + 0.001 * c.training.seed) * (c.model.experts > 0)
    draws = np.random.default_rng(0).normal(size=600)
    rows = lambda c, split: (draws - draws[:256].mean()) * (c.model.experts > 0)
    for_all = compare(config(), Trainer(loss), str(tmp_path / "without"), seeds=3)
    assert for_all["verdict"] == "better" and for_all["differences"]["validation"]["rows"] is None
    result = compare(config(), Trainer(loss, rows=lambda c, s: rows(c, s)[:256]), str(tmp_path / "with"), seeds=3)
    change = result["differences"]["validation"]
    assert change["mean"] == pytest.approx(-0.051, abs=1e-5) and change["rows"] == 256
    assert change["standard_errors"]["seeds"] == pytest.approx(0.001 / math.sqrt(3), rel=0.01)
    assert change["standard_errors"]["text"] == pytest.approx(1 / math.sqrt(256), rel=0.5)
    assert change["interval"][0] < -0.1 and result["verdict"] == "no difference seen"


def test_rows_that_both_sides_have_are_compared(tmp_path):
    """The sparse model was measured on more rows, which are worse."""
    rows = lambda c, split: np.where(np.arange(90 if c.model.experts else 40) < 40, 0.0, 9.0)
    train = Trainer(lambda c, *_: 3 - 0.1 * (c.model.experts > 0), rows=rows)
    result = compare(config(), train, str(tmp_path), seeds=2)
    change = result["differences"]["validation"]
    assert change["rows"] == 40 and change["per_seed"] == pytest.approx([-0.1, -0.1], abs=1e-6)


def test_a_damaged_file_of_rows_is_named(tmp_path):
    store(config(), tmp_path / "a", falling(), rows=lambda *_: np.zeros(4))
    whole = (tmp_path / "a/evaluation_rows.npz").read_bytes()
    for damaged in (b"", whole[:50], b"x" * 50, whole.replace(b"NUMPY", b"numpy")):
        (tmp_path / "a/evaluation_rows.npz").write_bytes(damaged)
        with pytest.raises(UserError, match="evaluation_rows.npz is damaged"):
            compare_runs(str(tmp_path / "a"), str(tmp_path / "a"))


def test_one_split_alone_has_a_verdict(tmp_path):
    """Of two verdicts at a level of 5 % one or the other would be wrong in up to 10 % of comparisons."""
    loss = lambda c, split, step: 5 - step / 50 - (split == "heldout_domain") * (c.model.experts > 0)
    result = compare(config(), Trainer(loss), str(tmp_path), seeds=3)
    assert result["verdict"] == "no difference seen" and result["differences"]["heldout_domain"]["mean"] == -1
    report = (tmp_path / "comparison.md").read_text()
    assert "heldout_domain, no verdict: Loss of sparse minus dense: -1.0000" in report and "is better" not in report


def test_speedups_are_averaged_as_ratios(tmp_path):
    """Four times as fast in one seed and as fast in the other is twice as fast."""
    loss = lambda c, split, step: falling(sparse=4.0 if c.training.seed else 1.0)(c, split, step)
    result = compare(config(), Trainer(loss), str(tmp_path), seeds=2)
    assert result["step_speedup_per_seed"] == pytest.approx([1, 4])
    assert result["step_speedup"] == pytest.approx(2)


def test_sizes_and_flops_are_those_of_the_configs(tmp_path):
    sparse, dense = config(), cost.dense_twin(config())
    result = compare(sparse, Trainer(falling()), str(tmp_path))
    for side, of in (("sparse", sparse), ("dense", dense)):
        counted = cost.count_flops(of.model, of.data.length)
        assert result[side]["total_params"] == cost.count_parameters(of.model).total
        assert result[side]["train_flops_per_token"] == counted.training
        assert result[side]["executed_flops_per_token"] == cost.step_flops(of, "cpu") / (4 * 16)
    extra = result["sparse"]["router_flops_per_token"]
    assert result["sparse"]["train_flops_per_token"] - extra == result["dense"]["train_flops_per_token"]


def test_text_of_another_fingerprint_is_refused(tmp_path):
    store(config(), tmp_path / "a", falling(), fingerprint="cafe")
    store(config(), tmp_path / "b", falling(), fingerprint="babe")
    with pytest.raises(UserError, match="cafe and babe"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_refused(tmp_path):
    for name in "ab":
        store(config(), tmp_path / name, falling())
    (tmp_path / "b" / "summary.json").unlink()
    with pytest.raises(UserError, match="b is not finished"):
        compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))


def test_two_sparse_runs_are_a_and_b_and_their_differences_are_listed(tmp_path):
    store(config(), tmp_path / "one", falling())
    store(config(model__capacity_factor=math.inf, model__init_scale=0.1), tmp_path / "two", falling(sparse=2.0))
    result = compare_runs(str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path))
    assert result["sides"] == ["a", "b"] and result["step_speedup"] == pytest.approx(2)
    assert result["config_differences"] == {"model.init_scale": [1.0, 0.1], "model.capacity_factor": [1.25, "inf"]}
    assert "start from different initial scales" in (tmp_path / "comparison.md").read_text()


def test_without_validation_there_is_no_comparison(tmp_path):
    train = Trainer(falling())
    with pytest.raises(UserError, match="'validation'"):
        compare(config(evaluation__splits=("heldout_domain",)), train, str(tmp_path))
    assert not train.calls


def test_a_router_of_a_later_version_can_be_compared(tmp_path):
    compare(config(model__router=choice("topk"), model__top_k=2), Trainer(falling()), str(tmp_path))


def tuned(best):
    """A loss that is lowest at each side's own best learning rate."""

    def loss(config, split, step):
        side = "sparse" if config.model.experts else "dense"
        return 3 + abs(math.log2(config.optimizer.learning_rate / best[side]))

    return loss


def test_each_side_gets_its_own_learning_rate(tmp_path):
    result = compare(config(), Trainer(tuned({"dense": 0.005, "sparse": 0.01})), str(tmp_path), sweep=True)
    assert (result["dense"]["learning_rate"], result["sparse"]["learning_rate"]) == (0.005, 0.01)
    assert [rate for rate, _ in result["sweep"]["sparse"]["losses"]] == [0.005, 0.01, 0.02]
    assert [rate for rate, _ in result["sweep"]["dense"]["losses"]] == [0.0025, 0.005, 0.01, 0.02]
    assert (result["dense"]["validation_loss"], result["sparse"]["validation_loss"]) == (3, 3)
    assert "| dense | 0.005, chosen | 3.0000 |" in (tmp_path / "comparison.md").read_text()
    assert result["sweep"]["dense"]["enclosed"] and "not tuned" not in format_summary(result)


def test_the_best_run_of_a_sweep_is_the_first_of_its_side(tmp_path):
    train = Trainer(tuned({"dense": 0.005, "sparse": 0.01}))
    result = compare(config(), train, str(tmp_path), seeds=2, sweep=True)
    assert result["dense"]["runs"] == [f"{tmp_path}/sweep/dense/learning-rate-0.005", f"{tmp_path}/dense-seed1"]
    assert result["sparse"]["runs"] == [f"{tmp_path}/sweep/sparse/learning-rate-0.01", f"{tmp_path}/sparse-seed1"]
    trained = [(c.training.seed, c.optimizer.learning_rate, c.model.experts) for c, _ in train.calls]
    assert len(trained) == len(set(trained)) == 4 + 3 + 2


@pytest.mark.parametrize(("best", "tried"), [(0.08, 6), (0.32, 8), (0.00016, 9)])
def test_the_grid_grows_until_the_best_is_enclosed(tmp_path, best, tried):
    result = compare(config(), Trainer(tuned({"dense": best, "sparse": 0.01})), str(tmp_path), sweep=True)
    rates = [rate for rate, _ in result["sweep"]["dense"]["losses"]]
    assert len(rates) == tried and (min(rates) < best < max(rates)) == result["sweep"]["dense"]["enclosed"]


def test_a_learning_rate_at_the_edge_stands_beside_the_verdict(tmp_path):
    result = compare(config(), Trainer(tuned({"dense": 10.0, "sparse": 0.01})), str(tmp_path), sweep=True)
    assert not result["sweep"]["dense"]["enclosed"] and len(result["sweep"]["dense"]["losses"]) == 9
    words = "not judged (not tuned: the best learning rate of dense is at the edge of those tried)"
    report = (tmp_path / "comparison.md").read_text()
    assert words in format_summary(result) and words in report
    assert "Not tuned: the best rate is the highest or lowest of those tried: dense." in report


def test_a_learning_rate_that_diverges_is_the_worst(tmp_path):
    class Failing(Trainer):
        def __call__(self, config, folder):
            if config.optimizer.learning_rate > 0.01:
                raise RunFailed("too many skipped steps")
            super().__call__(config, folder)

    loss = lambda c, split, step: math.nan if c.optimizer.learning_rate < 0.01 else 3.0
    result = compare(config(), Failing(loss), str(tmp_path), sweep=True)
    assert result["sweep"]["dense"]["losses"] == [[0.005, None], [0.01, 3.0], [0.02, None]]


def test_where_no_learning_rate_trains_the_comparison_fails(tmp_path):
    with pytest.raises(RunFailed, match="no learning rate of"):
        compare(config(), Trainer(lambda *_: math.nan), str(tmp_path), sweep=True)


def test_a_loss_that_is_not_finite_is_not_judged(tmp_path):
    loss = lambda c, split, step: math.nan if c.model.experts and step == 100 else 5 - step / 50
    result = compare(config(), Trainer(loss), str(tmp_path), seeds=2)
    assert result["verdict"] == "not judged: a loss is not finite"
    assert result["sparse"]["validation_loss"] is None
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_a_loss_that_looks_ahead_is_not_ranked(tmp_path):
    """Against a dense twin, which does not: no verdict and no speedup, and the report says why."""
    ahead = config(model__router=choice("expert_choice"), model__capacity_factor=1.0)
    result = compare(ahead, Trainer(falling(sparse=2.0)), str(tmp_path), seeds=2)
    assert result["verdict"] == "not ranked"
    assert [result[f"{name}_speedup"] for name in ("step", "time", "flops")] == [None, None, None]
    assert (result["dense"]["leak"], result["sparse"]["leak"]) == ("", "experts choose among all tokens of a group")
    report = (tmp_path / "comparison.md").read_text()
    assert "not ranked" in report and "experts choose among all tokens" in report


def test_places_look_ahead_only_where_they_run_out(tmp_path):
    for factor, word in ((1.0, "not ranked"), (math.inf, "better")):
        two = config(model__router=choice("topk"), model__top_k=2, model__eval_capacity_factor=factor)
        result = compare(two, Trainer(falling(sparse=2.0, noise=0.01)), str(tmp_path / str(factor)), seeds=3)
        assert result["verdict"] == word
