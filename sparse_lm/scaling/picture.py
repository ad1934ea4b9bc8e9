"""Plots a comparison: validation loss over steps and over seconds."""

import io
import math
from collections.abc import Sequence

from sparse_lm.scaling.curves import loss_curve
from sparse_lm.scaling.outcome import SPLIT, Run
from sparse_lm.scaling.statistics import mean

COLORS = ("#0072B2", "#D55E00")  # blue and vermilion of Okabe and Ito, distinct for all kinds of colour vision
STYLES = ("-", "--")  # distinct in print without colour


def plot_comparison(sides: dict[str, Sequence[Run]], title: str) -> bytes:
    """Plots a panel over steps and one over seconds: the mean of each side over its seeds, the band from its lowest to
    its highest seed, and the final loss of the first side, the baseline, dotted.

    Args:
        sides: runs by name of the side.
        title: of the figure.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    steps, seconds = figure.subplots(1, 2, sharey=True)
    for axes, unit, label in ((steps, "step", "training steps"), (seconds, "seconds", "seconds of training")):
        for (name, runs), color, style in zip(sides.items(), COLORS, STYLES, strict=True):
            x, low, mean, high = _compute_band(runs, unit)
            axes.plot(x, mean, style, color=color, linewidth=2, marker="o", markersize=3.5, label=name)
            if len(runs) > 1:
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_xlim(left=0)
    baseline = next(iter(sides))
    final = _compute_band(sides[baseline], "step")[2]
    if final and math.isfinite(final[-1]):
        for axes in (steps, seconds):
            axes.axhline(final[-1], color=COLORS[0], linestyle=":", linewidth=1.4, label=f"{baseline}, final loss")
    steps.set_ylabel("validation loss, nats per token")
    steps.legend(frameon=False)
    figure.suptitle(title, fontsize=11)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _compute_band(runs: Sequence[Run], unit: str) -> tuple[list[float], list[float], list[float], list[float]]:
    """Computes mean x, and lowest, mean and highest loss, at the evaluations that all runs have."""
    curves = [loss_curve(run.curve, SPLIT, unit) for run in runs]
    points = [list(zip(*c, strict=True)) for c in zip(*(zip(x, loss, strict=True) for x, loss in curves), strict=False)]
    finite = [(xs, losses) for xs, losses in points if all(map(math.isfinite, losses))]
    return (
        [mean(xs) for xs, _ in finite],
        [min(losses) for _, losses in finite],
        [mean(losses) for _, losses in finite],
        [max(losses) for _, losses in finite],
    )
