"""Loss curves of evaluations: when a loss is reached, and how much sooner than by another run."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def loss_curve(rows: Sequence[Row], split: str, along: str) -> tuple[list[float], list[float]]:
    """The values of `along` (step, seconds) and the losses of one split, by step, from the rows of eval.jsonl.

    A loss that was not finite is stored as null, and infinite here.
    """
    chosen = sorted((row for row in rows if row["split"] == split), key=lambda row: row["step"])
    return [row[along] for row in chosen], [math.inf if row["loss"] is None else row["loss"] for row in chosen]


def first_crossing(x: Sequence[float], loss: Sequence[float], target: float) -> float | None:
    """Where the loss first is at or below the target, interpolated linearly between evaluations; None if nowhere.

    Where the interpolation has nothing before it (the first evaluation, or one after an infinite loss), it is the place
    of the evaluation itself.
    """
    for i, value in enumerate(loss):
        if value <= target:
            if i == 0 or math.isinf(loss[i - 1]):
                return float(x[i])
            share = (loss[i - 1] - target) / (loss[i - 1] - value)
            return x[i - 1] + share * (x[i] - x[i - 1])
    return None


def speedup(baseline: Sequence[Row], rows: Sequence[Row], split: str, along: str) -> float | None:
    """How many times less of `along` a run needs than the baseline to reach the baseline's final loss, or None.

    Both are read by the same rule: a baseline that was at its final loss before its end is credited with that.
    """
    x, loss = loss_curve(baseline, split, along)
    if not loss or math.isinf(loss[-1]):
        return None
    own, other = first_crossing(x, loss, loss[-1]), first_crossing(*loss_curve(rows, split, along), loss[-1])
    return own / other if own and other else None
