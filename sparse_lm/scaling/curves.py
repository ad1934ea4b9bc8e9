"""Loss curves of evaluations: when a run reaches a loss, and its speedup over another run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def loss_curve(rows: Sequence[Row], split: str, unit: str) -> tuple[list[float], list[float]]:
    """Reads the loss curve of one split.

    Args:
        rows: of eval.jsonl.
        split: the split.
        unit: of the x axis, "step" or "seconds".

    Returns:
        x values and losses in nats per token, by step. A loss that is not finite, stored as null, is inf.
    """
    rows = sorted((row for row in rows if row["split"] == split), key=lambda row: row["step"])
    return [row[unit] for row in rows], [math.inf if row["loss"] is None else row["loss"] for row in rows]


def first_crossing(x: Sequence[float], loss: Sequence[float], target: float) -> float | None:
    """Finds the first x with a loss at or below the target, interpolated linearly between evaluations.

    Without a finite loss before, it is the x of the evaluation itself.

    Args:
        x: steps or seconds of the evaluations.
        loss: at each of them.
        target: the loss to reach.

    Returns:
        x; None if the target is not reached.
    """
    for i, value in enumerate(loss):
        if value <= target:
            if i == 0 or math.isinf(loss[i - 1]):
                return float(x[i])
            share = (loss[i - 1] - target) / (loss[i - 1] - value)
            return x[i - 1] + share * (x[i] - x[i - 1])
    return None


def speedup(baseline: Sequence[Row], rows: Sequence[Row], split: str, unit: str) -> float | None:
    """Computes how many times fewer steps or seconds a run needs than the baseline to reach the baseline's final loss.

    A baseline that reaches its final loss before its end is credited with that.

    Args:
        baseline: rows of eval.jsonl.
        rows: those of the other run.
        split: whose loss counts.
        unit: "step" or "seconds".

    Returns:
        The ratio; None if the run does not reach the loss.
    """
    x, loss = loss_curve(baseline, split, unit)
    if not loss or math.isinf(loss[-1]):
        return None
    baseline_x = first_crossing(x, loss, loss[-1])
    other_x = first_crossing(*loss_curve(rows, split, unit), loss[-1])
    return baseline_x / other_x if baseline_x and other_x else None
