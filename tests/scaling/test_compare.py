import json
import math
from pathlib import Path

import pytest

from sparse_lm import cost
from sparse_lm.config import choice
from sparse_lm.errors import RunFailed, UserError
from sparse_lm.scaling.compare import compare, compare_runs
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
    assert result["verdicts"] == dict.fromkeys(("validation", "heldout_domain"), "one seed: not judged")


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
    assert result["verdicts"]["validation"] == "better"
    wide = 4.30265273 / math.sqrt(3)
    assert result["dense"]["validation_loss_interval"] == pytest.approx([4 - wide, 4 + wide])


def test_noise_between_seeds_is_no_difference(tmp_path):
    result = compare(config(), Trainer(falling(noise=0.1)), str(tmp_path), seeds=3)
    assert result["verdicts"]["validation"] == "no difference seen"


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


def test_the_grid_grows_at_most_twice(tmp_path):
    result = compare(config(), Trainer(tuned({"dense": 1.0, "sparse": 0.01})), str(tmp_path), sweep=True)
    assert result["sweep"]["dense"]["best"] == 0.08 and result["sweep"]["dense"]["at_edge"]
    assert "so that one beyond it may do more: dense." in (tmp_path / "comparison.md").read_text()


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
    assert result["verdicts"]["validation"] == "not judged: a loss is not finite"
    assert result["sparse"]["validation_loss"] is None
    json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)


def test_a_loss_that_looks_ahead_is_not_ranked(tmp_path):
    """Against a dense twin, which does not: no verdict and no speedup, and the report says why."""
    ahead = config(model__router=choice("expert_choice"), model__capacity_factor=1.0)
    result = compare(ahead, Trainer(falling(sparse=2.0)), str(tmp_path), seeds=2)
    assert set(result["verdicts"].values()) == {"not ranked"}
    assert [result[f"{name}_speedup"] for name in ("step", "time", "flops")] == [None, None, None]
    assert (result["dense"]["leak"], result["sparse"]["leak"]) == ("", "experts choose among all tokens of a group")
    report = (tmp_path / "comparison.md").read_text()
    assert "not ranked" in report and "experts choose among all tokens" in report


def test_places_look_ahead_only_where_they_run_out(tmp_path):
    for factor, words in ((1.0, {"not ranked"}), (math.inf, {"better"})):
        two = config(model__router=choice("topk"), model__top_k=2, model__eval_capacity_factor=factor)
        result = compare(two, Trainer(falling(sparse=2.0, noise=0.01)), str(tmp_path / str(factor)), seeds=3)
        assert set(result["verdicts"].values()) == words
