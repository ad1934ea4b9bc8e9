"""What finished runs of two sides say about each other: `comparison.json`."""

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

SPLIT = "validation"  # where speedups are read


@dataclass(frozen=True)
class Run:
    """A finished run."""

    path: str
    config: Config
    summary: dict[str, Any]
    curve: list[dict[str, Any]]  # the rows of eval.jsonl

    def loss(self, split: str) -> float:
        """Final loss in nats per token; NaN where it was not finite."""
        loss = self.summary["evaluation"][split]["loss"]
        return math.nan if loss is None else loss


def load_finished_run(path: epath.PathLike) -> Run:
    """The run in a folder. Raises `UserError` where there is none, or none that is finished."""
    config, summary = read_config(path), read_summary(path)
    if summary is None:
        raise UserError(f"the run in {path} is not finished; the train command that began it goes on with it")
    return Run(str(path), config, summary, read_rows(path, "eval"))


def compare_sides(sides: dict[str, Sequence[Run]], price_per_hour: float | None = None) -> dict[str, Any]:
    """Compares two sides of as many runs each, the baseline first; run i of both is one pair (one seed).

    price_per_hour: of all devices of a run together, in any currency; adds the `cost` of one run of each side.

    Where the routing of one side looks ahead (`routing.leak`) and the other's does not, or in another way, their losses
    are not of the same task: no verdict, no speedup.

    Raises `UserError` where the runs were not trained and evaluated on the same text.
    """
    (first, baseline), (second, runs) = sides.items()
    pairs = list(zip(baseline, runs, strict=True))
    fingerprint = _check_same_text([*baseline, *runs])
    splits = [split for split in baseline[0].summary["evaluation"] if split in runs[0].summary["evaluation"]]
    same_task = _leak(baseline[0]) == _leak(runs[0])
    differences = {split: [run.loss(split) - base.loss(split) for base, run in pairs] for split in splits}
    of_pairs = lambda measure: [measure(b, r) if same_task else None for b, r in pairs]
    return {
        "sides": [first, second],
        "seeds": len(pairs),
        "steps": baseline[0].summary["steps"],
        "fingerprint": fingerprint,
        "devices": baseline[0].summary["devices"],
        first: _summarize_side(baseline, splits, price_per_hour),
        second: _summarize_side(runs, splits, price_per_hour),
        **_name_statistics("step_speedup", of_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "step"))),
        **_name_statistics("time_speedup", of_pairs(lambda b, r: speedup(b.curve, r.curve, SPLIT, "seconds"))),
        **_name_statistics("flops_speedup", of_pairs(_flops_speedup)),
        "verdicts": {split: verdict(values) if same_task else NOT_RANKED for split, values in differences.items()},
        "differences": {split: _summarize(values) for split, values in differences.items()},
        "config_differences": config_differences(baseline[0].config, runs[0].config),
    }


def config_differences(a: Config, b: Config) -> dict[str, list]:
    """The fields that could make the runs come out differently, with both values: [a's, b's]."""

    def flat(config: Config) -> dict[str, Any]:
        rest = {f"{part}.{n}": v for part in ("mesh", "evaluation") for n, v in to_dict(getattr(config, part)).items()}
        fields = identity_fields(config) | rest | {"training.steps": config.training.steps}
        return {n: str(v) if isinstance(v, float) and math.isinf(v) else v for n, v in fields.items()}

    of_a, of_b = flat(a), flat(b)
    names = list(of_a) + [name for name in of_b if name not in of_a]
    return {n: [of_a.get(n), of_b.get(n)] for n in names if of_a.get(n) != of_b.get(n)}


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
    """Of the model FLOPs that were trained with, by the step at which the baseline's final loss is reached."""
    steps = speedup(base.curve, run.curve, SPLIT, "step")
    return None if steps is None else steps * _model_step_flops(base.config) / _model_step_flops(run.config)


def _model_step_flops(config: Config) -> float:
    return count_flops(config.model, config.data.length).training * config.training.batch * config.data.length


def _name_statistics(name: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Mean, interval and single values under one name; null where a value is missing."""
    all_of_it = _summarize(values)
    return {name: all_of_it["mean"]} | {f"{name}_{key}": all_of_it[key] for key in ("interval", "per_seed")}


def _summarize(values: Sequence[float | None]) -> dict[str, Any]:
    finite = [value if value is not None and math.isfinite(value) else None for value in values]
    if None in finite:
        return {"mean": None, "interval": None, "per_seed": finite}
    bounds = confidence_interval(finite)
    return {"mean": mean(finite), "interval": bounds and list(bounds), "per_seed": finite}


def _mean(values: Sequence[float | None]) -> float | None:
    return _summarize(values)["mean"]
