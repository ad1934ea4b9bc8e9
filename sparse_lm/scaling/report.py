"""Formats a comparison for the terminal and as Markdown, and writes the files of its folder."""

import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from sparse_lm.cost.info import format_quantity, format_table
from sparse_lm.runs.folder import write_whole
from sparse_lm.scaling.outcome import Run
from sparse_lm.scaling.picture import plot_comparison
from sparse_lm.scaling.statistics import BETTER, NOT_RANKED, SAME, WORSE, count_stretches

Comparison = dict[str, Any]


def write_report(result: Comparison, sides: dict[str, Sequence[Run]], folder: epath.Path) -> None:
    """Writes comparison.json, comparison.md and comparison.png; each file is complete or not written."""
    seeds = f"{result['seeds']} seeds, band: lowest to highest" if result["seeds"] > 1 else "one seed"
    title = f"{result['config']}: {' and '.join(result['sides'])}, {seeds}"
    files = {
        "comparison.png": plot_comparison(sides, title),
        "comparison.md": format_markdown(result).encode(),
        "comparison.json": (json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_whole(folder / name, content)


def format_summary(result: Comparison) -> str:
    """Formats a comparison for a terminal."""
    rows = [[text.replace("**", "") for text in row] for row in _table_rows(result)]
    return "\n\n".join((format_table(rows), "\n".join(_verdict_lines(result)), "\n".join(_speedup_lines(result))))


def format_markdown(result: Comparison) -> str:
    """Formats a comparison as Markdown, for comparison.md."""
    head, *rows = _table_rows(result)
    lines = [f"# {result['config']}: {' and '.join(result['sides'])}", "", *_verdict_lines(result, "- "), ""]
    lines += [f"| {' | '.join(head)} |", "| --- | ---: | ---: |", *(f"| {' | '.join(row)} |" for row in rows), ""]
    lines += ["## How much sooner", "", *_speedup_lines(result, "- "), ""]
    lines += ["![validation loss over steps and over seconds](comparison.png)", ""]
    lines += ["## What was compared", "", *_comparison_lines(result), ""]
    if result["sweep"]:
        lines += ["## Learning rates", "", *_sweep_lines(result["sweep"]), ""]
    lines += ["## What differs in the configs", "", *_difference_lines(result), ""]
    return "\n".join(lines)


def _table_rows(result: Comparison) -> list[list[str]]:
    sides = [result[side] for side in result["sides"]]
    flop = lambda value: format_quantity(value, "FLOP")
    number = lambda value: f"{value:.4f}"
    rows = [["", *result["sides"]]]

    def row(label: str, name: str, form) -> None:
        rows.append([label, *(_format_interval(side.get(name), side.get(f"{name}_interval"), form) for side in sides)])

    row("parameters", "total_params", format_quantity)
    row("parameters that a token uses", "active_params", format_quantity)
    row("training FLOPs per token", "train_flops_per_token", flop)
    row("of these the router's", "router_flops_per_token", flop)
    row("executed FLOPs per token", "executed_flops_per_token", flop)
    for split in result["differences"]:
        row(f"{split} loss, nats per token", f"{split}_loss", number)
        rows.append(
            [f"{split}, bits per byte", *(_format_value(side["bits_per_byte"][split], number) for side in sides)]
        )
    row("tokens per second", "tokens_per_second", lambda v: f"{v:,.0f}")
    row("seconds of training", "seconds", lambda v: f"{v:,.1f}")
    if "cost" in sides[0]:
        row("cost of one run", "cost", lambda v: f"{v:,.2f}")
    return rows


def _format_value(value: float | None, form) -> str:
    return "none" if value is None else form(value)


def _format_interval(value: float | None, interval: list[float] | None, form) -> str:
    text = _format_value(value, form)
    return f"{text} ({form(interval[0])} to {form(interval[1])})" if interval else text


def _verdict_lines(result: Comparison, mark: str = "") -> list[str]:
    first, second = result["sides"]
    decides, verdict = result["decides"], result["verdict"]
    if verdict == NOT_RANKED:
        return [f"{mark}{verdict}, {_explain_not_ranked(result)}."]
    statement = {
        BETTER: f"the {second} model is better",
        WORSE: f"the {second} model is worse",
        SAME: f"{SAME} between the {second} model and the {first} one",
    }.get(verdict, verdict)
    untuned = [side for side, tuned in (result["sweep"] or {}).items() if not tuned["enclosed"]]
    if untuned:
        statement += f" (not tuned: the best learning rate of {' and '.join(untuned)} is at the edge of those tried)"
    lines = [f"{mark}{decides}: {statement}. {_format_difference(result, decides)}".rstrip()]
    others = [split for split in result["differences"] if split != decides]
    return lines + [f"{mark}{split}, no verdict: {_format_difference(result, split)}" for split in others]


def _format_difference(result: Comparison, split: str) -> str:
    """Says by how much the losses differ, and how certain that is; nothing where one is not finite."""
    first, second = result["sides"]
    change = result["differences"][split]
    if change["mean"] is None:
        return ""
    seeds = f"{result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    notes = [seeds + (f" and {change['rows']:,} rows of text" if change["rows"] else "")]
    if bounds := change["interval"]:
        notes.insert(0, f"95 % interval {bounds[0]:+.4f} to {bounds[1]:+.4f}")
    if errors := {k: v for k, v in (change["standard_errors"] or {}).items() if v is not None}:
        notes.append("standard error " + " and ".join(f"{error:.4f} from {kind}" for kind, error in errors.items()))
    return f"Loss of {second} minus {first}: {change['mean']:+.4f} nats per token ({'; '.join(notes)})."


def _speedup_lines(result: Comparison, mark: str = "") -> list[str]:
    first, second = result["sides"]
    if result["verdict"] == NOT_RANKED:
        return [f"{mark}How much sooner a loss is reached can't be said, {_explain_not_ranked(result)}."]
    if result["step_speedup"] is None:
        reached = sum(value is not None for value in result["step_speedup_per_seed"])
        seeds = f"in {reached} of {result['seeds']} seeds" if reached else "in any seed" if result["seeds"] > 1 else ""
        verb = "reaches" if reached else "does not reach"
        return [f"{mark}The {second} model {verb} the {first} model's final validation loss {seeds}".rstrip() + "."]
    lines = [f"{mark}To reach the {first} model's final validation loss, the {second} model needs"]
    for name, unit in (("step", "steps"), ("flops", "training FLOPs"), ("time", "seconds")):
        value, bounds = result[f"{name}_speedup"], result[f"{name}_speedup_interval"]
        if value is not None:
            lines.append(
                f"{'  ' if not mark else '  - '}{_format_ratio(value)} {unit}" + _format_ratio_interval(bounds)
            )
    return lines


def _explain_not_ranked(result: Comparison) -> str:
    leaks = [f"in the {side} model {result[side]['leak']}" for side in result["sides"] if result[side]["leak"]]
    return f"since a loss that looks ahead is not that of a causal language model: {', and '.join(leaks)}"


def _format_ratio(value: float) -> str:
    return f"{value:.2f} times fewer" if value >= 1 else f"{1 / value:.2f} times as many"


def _format_ratio_interval(bounds: list[float] | None) -> str:
    return f" (95 % interval of the ratio {bounds[0]:.2f} to {bounds[1]:.2f})" if bounds else ""


def _comparison_lines(result: Comparison) -> list[str]:
    first, second = (result[side] for side in result["sides"])
    devices = result["devices"]
    hardware = f"{devices['count']} {devices['kind']}" if isinstance(devices, dict) else str(devices)
    lines = [
        f"{result['steps']} steps on {hardware}; text of fingerprint {result['fingerprint']}. "
        + (f"Each number is the mean of {result['seeds']} seeds, with its 95 % interval; of speedups, that of their "
           "logarithms." if result["seeds"] > 1 else
           "With one seed nothing tells a difference from the noise between seeds; `--seeds=3` or more does."),
        "",
        *_noise_lines(result),
        "*Training FLOPs* are those that the mathematics needs: the matrix products of one token forward and backward, "
        "attention over the half of the row that a token sees on average. *Executed FLOPs* are those that the program "
        "runs, with attention scores that are masked, places of experts that stay empty, masks and the optimizer.",
    ]  # fmt: skip
    if set(result["sides"]) == {"dense", "sparse"}:
        router_share = second["router_flops_per_token"] / second["train_flops_per_token"]
        params_ratio, flops_ratio = (second[n] / first[n] for n in ("total_params", "executed_flops_per_token"))
        lines += [
            "",
            "A token passes through one dense feed-forward layer, or through as many experts as add up to its width. "
            f"Where both models are otherwise the same, they differ by the router alone, {router_share:.1%} of the "
            f"sparse model's training FLOPs. It holds {params_ratio:.1f} times the parameters, and its program runs "
            f"{flops_ratio:.2f} times the FLOPs per token.",
        ]
    lines += [
        "",
        "How much sooner a loss is reached is read off the curve of evaluations, in the middle of the learning rate "
        "schedule: a run that was planned to end there would usually have a lower loss at that point.",
    ]
    skipped = {side: result[side]["skipped_steps"] for side in result["sides"]}
    if any(skipped.values()):
        counts = ", ".join(f"{side} {number}" for side, number in skipped.items())
        lines += ["", f"Steps skipped for a non-finite gradient: {counts}."]
    return lines


def _noise_lines(result: Comparison) -> list[str]:
    seeds, rows = result["seeds"], result["differences"][result["decides"]]["rows"]
    lines = [
        f"The verdict is on {result['decides']} alone, which was settled before the runs: of several verdicts one or "
        "the other is wrong more often than the level of each says.",
        "",
    ]
    if rows:
        lines += [
            "Intervals of losses hold two kinds of noise: of the seed, and of the text, which all runs share. Text is "
            f"compared in {count_stretches(rows)} stretches of neighbouring rows, since rows of one document resemble "
            "each other.",
            "",
        ]
    else:
        lines += ["The losses of single rows are not stored in these runs: intervals leave out the noise of text.", ""]
    if seeds > 1:
        lines += [
            f"They trust that the noise of seeds is about normal, which {seeds} seeds can't show. Where single seeds "
            "train much less well now and then, a verdict at no difference is given two or three times as often as in "
            "the 5 % of cases that the level allows.",
            "",
        ]
    return lines


def _sweep_lines(sweep: dict[str, Any]) -> list[str]:
    lines = ["Each side was first trained at each of these learning rates, and compared at its own best.", ""]
    lines += ["| side | learning rate | validation loss |", "| --- | ---: | ---: |"]
    for side, tuned in sweep.items():
        for rate, loss in tuned["losses"]:
            best = ", chosen" if rate == tuned["best"] else ""
            lines.append(f"| {side} | {rate:.3g}{best} | {_format_value(loss, lambda v: f'{v:.4f}')} |")
    if edges := [side for side, tuned in sweep.items() if not tuned["enclosed"]]:
        lines += ["", f"Not tuned: the best rate is the highest or lowest of those tried: {', '.join(edges)}."]
    return lines


def _difference_lines(result: Comparison) -> list[str]:
    differences = result["config_differences"]
    if not differences:
        return ["Nothing."]
    lines = [f"| field | {' | '.join(result['sides'])} |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {a} | {b} |" for name, (a, b) in differences.items()]
    if "model.init_scale" in differences:
        lines += [
            "",
            "**The models start from different initial scales** (model.init_scale), so that the initialisation may be "
            "what decides; `sparse-lm compare --config=…` derives a twin that starts from the same.",
        ]
    return lines
