"""Compares the finished runs of two sides: the content of `comparison.json`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from sparse_lm.config import Config, identity_fields, to_dict
from sparse_lm.cost.flops import count_flops, step_flops
from sparse_lm.errors import UserError
from sparse_lm.routing import leak
from sparse_lm.runs.folder import read_config, read_rows, read_summary
from sparse_lm.scaling.curves import speedup
from sparse_lm.scaling.statistics import NOT_RANKED, confidence_interval, mean, verdict

SPLIT = "validation"  # for speedups


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: str
    config: Config
    summary: dict[str, Any]
    curve: list[dict[str, Any]]  # the rows of eval.jsonl

    def loss(self, split: str) -> float:
        """Returns the final loss in nats per token; NaN if it is not finite."""
        loss = self.summary["evaluation"][split]["loss"]
        return math.nan if loss is None else loss


def load_finished_run(path: epath.PathLike) -> Run:
    """Loads the run in a folder. Raises `UserError` if there is none, or it is not finished."""
    config, summary = read_config(path), read_summary(path)
    if summary is None:
        raise UserError(f"the run in {path} is not finished; the train command that began it goes on with it")
    return Run(str(path), config, summary, read_rows(path, "eval"))


def compare_sides(sides: dict[str, Sequence[Run]], price_per_hour: float | None = None) -> dict[str, Any]:
    """Compares two sides with the same number of runs.

    If the routing of the sides looks ahead differently (`routing.leak`), their losses are not of the same task: there
    are no verdicts and no speedups.

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
    differences = {split: [run.loss(split) - base.loss(split) for base, run in pairs] for split in splits}
    measure_pairs = lambda measure: [measure(b, r) if same_task else None for b, r in pairs]
    return {
        "sides": [first, second],
        "seeds": len(pairs),
        "steps": baseline[0].summary["steps"],
        "fingerprint": fingerprint,
        "devices": baseline[0].summary["devices"],
        first: _summarize_side(baseline, splits, price_per_hour),
        second: _summarize_side(runs, splits, price_per_hour),
        **_name_statistics("step_speedup", measure_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "step"))),
        **_name_statistics("time_speedup", measure_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "seconds"))),
        **_name_statistics("flops_speedup", measure_pairs(_flops_speedup)),
        "verdicts": {split: verdict(values) if same_task else NOT_RANKED for split, values in differences.items()},
        "differences": {split: _summarize(values) for split, values in differences.items()},
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
        losses = [run.loss(split) for run in runs] if split in splits else [None]
        side |= _name_statistics(f"{split}_loss", losses)
    for name in ("bits_per_byte", "loss_train_capacity"):
        side[name] = {s: _mean([summary["evaluation"][s].get(name) for summary in summaries]) for s in splits}
    for name in ("tokens_per_second", "seconds"):
        side |= _name_statistics(name, [summary[name] for summary in summaries])
    if price_per_hour is not None:
        side |= _name_statistics("cost", [summary["seconds"] / 3600 * price_per_hour for summary in summaries])
    return side


def _leak(run: Run) -> str:
    return leak(run.config.model, run.config.model.eval_capacity_factor)


def _flops_speedup(base: Run, run: Run) -> float | None:
    """Computes the ratio of model FLOPs trained with until the baseline's final loss is reached."""
    steps = speedup(base.curve, run.curve, SPLIT, "step")
    return None if steps is None else steps * _model_step_flops(base.config) / _model_step_flops(run.config)


def _model_step_flops(config: Config) -> float:
    return count_flops(config.model, config.data.length).training * config.training.batch * config.data.length


def _name_statistics(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, interval and single values under one name; null where a value is missing."""
    summary = _summarize(values)
    return {name: summary["mean"]} | {f"{name}_{key}": summary[key] for key in ("interval", "per_seed")}


def _summarize(values: Sequence[float | None]) -> dict[str, Any]:
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    if None in finite:
        return {"mean": None, "interval": None, "per_seed": finite}
    bounds = confidence_interval(finite)
    return {"mean": mean(finite), "interval": bounds and list(bounds), "per_seed": finite}


def _mean(values: Sequence[float | None]) -> float | None:
    return _summarize(values)["mean"]
