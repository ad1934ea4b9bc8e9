"""Compares the finished runs of two sides: the content of `comparison.json`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from sparse_lm.config import Config, identity_fields, to_dict
from sparse_lm.cost.flops import count_flops, step_flops
from sparse_lm.errors import UserError
from sparse_lm.routing import leak
from sparse_lm.runs.folder import read_config, read_evaluation_rows, read_rows, read_summary
from sparse_lm.runs.measures import RowMeasures
from sparse_lm.scaling.curves import speedup
from sparse_lm.scaling.statistics import (
    NOT_RANKED,
    confidence_interval,
    judge_difference,
    mean,
    mean_interval,
    measure_noise,
    ratio_interval,
)

SPLIT = "validation"  # decides, alone: with a verdict on every split some would be wrong more often than one is


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: str
    config: Config
    summary: dict[str, Any]
    curve: list[dict[str, Any]]  # the rows of eval.jsonl
    rows: dict[str, RowMeasures]  # by split, after the last step; none in runs of version 0.2 or before

    def loss(self, split: str) -> float:
        """Returns the final loss in nats per token; NaN if it is not finite."""
        loss = self.summary["evaluation"][split]["loss"]
        return math.nan if loss is None else loss


def load_finished_run(path: epath.PathLike) -> Run:
    """Loads the run in a folder. Raises `UserError` if there is none, or it is not finished."""
    config, summary = read_config(path), read_summary(path)
    if summary is None:
        raise UserError(f"the run in {path} is not finished; the train command that began it goes on with it")
    return Run(str(path), config, summary, read_rows(path, "eval"), read_evaluation_rows(path))


def compare_sides(sides: dict[str, Sequence[Run]], price_per_hour: float | None = None) -> dict[str, Any]:
    """Compares two sides with the same number of runs.

    The verdict is on `SPLIT` alone; other splits have differences and intervals. If the routing of the sides looks
    ahead differently (`routing.leak`), their losses are not of the same task: no verdict and no speedups.

    Args:
        sides: runs by name of the side, the baseline first; run i of each side has the same seed.
        price_per_hour: of all devices of a run together, in any currency; adds the `cost` of one run of each side.

    Raises:
        UserError: if the runs were not trained and evaluated on the same text.
    """
    (first, baseline), (second, runs) = sides.items()
    pairs = list(zip(baseline, runs, strict=True))
    fingerprint = _check_same_text([*baseline, *runs])
    splits = [split for split in baseline[0].summary["evaluation"] if split in runs[0].summary["evaluation"]]
    same_task = _leak(baseline[0]) == _leak(runs[0])
    differences = {split: _measure(runs, split, baseline) for split in splits}
    judged = differences[SPLIT]
    of_pairs = lambda measure: [measure(b, r) if same_task else None for b, r in pairs]
    return {
        "sides": [first, second],
        "seeds": len(pairs),
        "steps": baseline[0].summary["steps"],
        "fingerprint": fingerprint,
        "devices": baseline[0].summary["devices"],
        first: _summarize_side(baseline, splits, price_per_hour),
        second: _summarize_side(runs, splits, price_per_hour),
        **_name("step_speedup", _summarize_ratios(of_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "step")))),
        **_name("time_speedup", _summarize_ratios(of_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "seconds")))),
        **_name("flops_speedup", _summarize_ratios(of_pairs(_flops_speedup))),
        "decides": SPLIT,
        "verdict": judge_difference(judged["mean"], judged["interval"]) if same_task else NOT_RANKED,
        "differences": differences,
        "config_differences": config_differences(baseline[0].config, runs[0].config),
    }


def config_differences(a: Config, b: Config) -> dict[str, list]:
    """Lists the fields that could change the result of a run and differ, with their values [a's, b's]."""

    def flatten(config: Config) -> dict[str, Any]:
        rest = {f"{part}.{n}": v for part in ("mesh", "evaluation") for n, v in to_dict(getattr(config, part)).items()}
        fields = identity_fields(config) | rest | {"training.steps": config.training.steps}
        return {n: str(v) if isinstance(v, float) and math.isinf(v) else v for n, v in fields.items()}

    fields_a, fields_b = flatten(a), flatten(b)
    values = {n: [fields_a.get(n), fields_b.get(n)] for n in fields_a | fields_b}
    return {n: pair for n, pair in values.items() if pair[0] != pair[1]}


def _check_same_text(runs: Sequence[Run]) -> str:
    first = runs[0].summary["fingerprint"]
    for run in runs[1:]:
        if (other := run.summary["fingerprint"]) != first:
            raise UserError(
                f"{runs[0].path} and {run.path} are of different text (fingerprints {first} and {other}); their losses "
                "can't be compared; train both on the same data"
            )
    return first


def _summarize_side(runs: Sequence[Run], splits: Sequence[str], price_per_hour: float | None) -> dict[str, Any]:
    config, summaries = runs[0].config, [run.summary for run in runs]
    cost, tokens = count_flops(config.model, config.data.length), config.training.batch * config.data.length
    side: dict[str, Any] = {
        "name": config.name,
        "runs": [run.path for run in runs],
        "total_params": summaries[0]["parameters"]["total"],
        "active_params": summaries[0]["parameters"]["active"],
        "train_flops_per_token": cost.training,
        "router_flops_per_token": cost.router,
        "executed_flops_per_token": step_flops(config, summaries[0]["devices"]["platform"]) / tokens,
        "learning_rate": config.optimizer.learning_rate,
        "leak": _leak(runs[0]),
        "skipped_steps": sum(summary.get("skipped_steps", 0) for summary in summaries),
    }
    for split in dict.fromkeys((SPLIT, "heldout_domain", *splits)):
        side |= _name(f"{split}_loss", _measure(runs, split) if split in splits else _summarize([None]))
    for name in ("bits_per_byte", "loss_train_capacity"):
        side[name] = {s: _mean([summary["evaluation"][s].get(name) for summary in summaries]) for s in splits}
    for name in ("tokens_per_second", "seconds"):
        side |= _name(name, _summarize([summary[name] for summary in summaries]))
    if price_per_hour is not None:
        side |= _name("cost", _summarize([summary["seconds"] / 3600 * price_per_hour for summary in summaries]))
    return side


def _leak(run: Run) -> str:
    return leak(run.config.model, run.config.model.eval_capacity_factor)


def _flops_speedup(base: Run, run: Run) -> float | None:
    """Computes the ratio of model FLOPs trained with until the baseline's final loss is reached."""
    steps = speedup(base.curve, run.curve, SPLIT, "step")
    return None if steps is None else steps * _model_step_flops(base.config) / _model_step_flops(run.config)


def _model_step_flops(config: Config) -> float:
    return count_flops(config.model, config.data.length).training * config.training.batch * config.data.length


def _measure(runs: Sequence[Run], split: str, baseline: Sequence[Run] = ()) -> dict[str, Any]:
    """Summarizes the losses of runs, or what they differ by from a baseline's, with the noise of seeds and text."""
    losses = np.array([run.loss(split) for run in runs])
    if baseline:
        losses = losses - [run.loss(split) for run in baseline]
    rows = [run.rows.get(split) for run in (*runs, *baseline)]
    count = min((len(r["tokens"]) for r in rows if r), default=0)
    if None in rows or not count or not np.isfinite(losses).all():  # an old run: nothing is known of its rows
        return _summarize(losses.tolist()) | {"rows": None, "standard_errors": None}
    # The first rows, which runs of one text have in common, in the order of the text.
    first = rows[0]
    order = np.lexsort(first["place"][:count].T[::-1])
    tokens = first["tokens"][:count][order].astype(np.float64)
    sums = np.stack([r["cross_entropy"][:count][order] for r in rows]).astype(np.float64)
    sums = sums[: len(runs)] - (sums[len(runs) :] if baseline else 0)
    values = (sums.sum(axis=1) / tokens.sum()).tolist()
    noise = measure_noise(sums, tokens)
    bounds = mean_interval(mean(values), noise, len(runs), count)
    return {
        "mean": mean(values),
        "interval": bounds and list(bounds),
        "per_seed": values,
        "rows": count,
        "standard_errors": {"seeds": noise.seeds, "text": noise.text},
    }


def _name(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    """Mean, interval and single values under one name; null where a value is missing."""
    return {name: summary["mean"]} | {f"{name}_{key}": summary[key] for key in ("interval", "per_seed")}


def _summarize(values: Sequence[float | None]) -> dict[str, Any]:
    return _summarize_by(lambda finite: (mean(finite), confidence_interval(finite)), values)


def _summarize_ratios(ratios: Sequence[float | None]) -> dict[str, Any]:
    return _summarize_by(ratio_interval, ratios)


def _summarize_by(estimate: Callable, values: Sequence[float | None]) -> dict[str, Any]:
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    center, bounds = (None, None) if None in finite else estimate(finite)
    return {"mean": center, "interval": bounds and list(bounds), "per_seed": finite}


def _mean(values: Sequence[float | None]) -> float | None:
    return _summarize(values)["mean"]
