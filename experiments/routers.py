"""Every router in the quickstart's setting, against the random control.

    python -m experiments.routers --config=configs/quickstart.py --workdir=runs/routers [--seeds=3] [--routers=…]

Trains each with the same FLOPs per token, and writes routers.md, a table of held-out loss (and its difference to the
control's on the same batches) with 95 % intervals and of routing health, and routers.png, how even the load is over the
steps. A finished run is not trained again. Where an evaluation looks ahead there is no difference: its loss can't be
ranked with the others'.
"""

import dataclasses
import io
import math
import sys

from absl import flags
from etils import epath

from sparse_lm.command_line import define_config
from sparse_lm.config import Config, choice, resolve
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.routing import leak
from sparse_lm.runs.folder import read_rows, write_whole
from sparse_lm.scaling.outcome import SPLIT, Run, load_finished_run
from sparse_lm.scaling.statistics import confidence_interval, mean

# One expert of the quickstart's width per token, or two of half of it. A run is short, so deepseek's bias moves ten
# times as fast as in a long one.
TWO = {"experts": 16, "top_k": 2, "expert_width": 256}
DROPLESS = {"capacity_factor": math.inf}
CHOICES = {
    "random": {"router": choice("random")},
    "switch": {"router": choice("switch")},
    "topk": {"router": choice("topk"), **TWO, **DROPLESS},
    "topk, prioritised": {"router": choice("topk", priority=True), **TWO},
    "noisy_topk": {"router": choice("noisy_topk"), **TWO},
    "gshard": {"router": choice("gshard"), **TWO},
    "deepseek": {"router": choice("deepseek", bias_rate=0.01), **TWO, **DROPLESS},
    "quantile": {"router": choice("quantile"), **TWO, **DROPLESS},
    "remoe": {"router": choice("remoe", bound=2), **TWO, **DROPLESS},
    "hash": {"router": choice("hash")},
    "hash, gated": {"router": choice("hash", gate=True), **TWO, **DROPLESS},
    "sinkhorn": {"router": choice("sinkhorn")},
    "base": {"router": choice("base")},
    "expert_choice": {"router": choice("expert_choice"), "capacity_factor": 1.0},
    "soft": {"router": choice("soft"), "capacity_factor": 1.0},
    "mixture_of_depths": {"router": choice("mixture_of_depths"), "experts": 1, "capacity_factor": 0.25},
}


def main() -> None:
    values = flags.FlagValues()
    flags.DEFINE_integer("seeds", 3, "runs of each router", flag_values=values)
    flags.DEFINE_string("workdir", "runs/routers", "", flag_values=values)
    flags.DEFINE_list("routers", list(CHOICES), "", flag_values=values)
    define_config(values, sys.argv)
    values(sys.argv)
    keep_freed_memory()
    runs: dict[str, list[Run]] = {name: [] for name in values.routers}
    for seed in range(values.seeds):
        for name in values.routers:
            folder = f"{values.workdir}/{name.replace(', ', '-')}-seed{seed}"
            runs.train(configured(values.config, name, seed), folder)
            runs[name].append(load_finished_run(folder))
    folder = epath.Path(values.workdir)
    write_whole(folder / "routers.md", (text := table(runs)).encode())
    write_whole(folder / "routers.png", picture(runs))
    print(text)


def configured(config: Config, name: str, seed: int) -> Config:
    model = dataclasses.replace(config.model, **CHOICES[name])
    training = dataclasses.replace(config.training, seed=config.training.seed + seed)
    return resolve(dataclasses.replace(config, model=model, training=training, name=name))


def table(runs: dict[str, list[Run]]) -> str:
    lines = [
        "| router | validation loss | minus random's | load CV | dropped in training | looks ahead |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, of_router in runs.items():
        losses = [run.loss(SPLIT) for run in of_router]
        model = of_router[0].config.model
        evaluated, trained = leak(model, model.eval_capacity_factor), leak(model, model.capacity_factor, training=True)
        ahead = evaluated or (f"in training: {trained}" if trained else "no")
        against = "–"
        if not evaluated and name != "random" and "random" in runs:
            against = spread([a - b.loss(SPLIT) for a, b in zip(losses, runs["random"], strict=True)])
        health = [mean([last(run, figure) for run in of_router]) for figure in ("load_cv", "dropped")]
        lines.append(f"| {name} | {spread(losses)} | {against} | {health[0]:.2f} | {health[1]:.1%} | {ahead} |")
    return "\n".join(lines) + "\n"


def spread(losses: list[float]) -> str:
    bounds = confidence_interval(losses)
    return f"{mean(losses):.3f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def last(of_router: Run, figure: str) -> float:
    """A figure of routing health in the last row of metrics, mean over the layers."""
    row = read_rows(of_router.path, "metrics")[-1]
    return mean([value for name, value in row.items() if name.startswith("routing/") and name.endswith(f"/{figure}")])


def picture(runs: dict[str, list[Run]]) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for i, (name, of_router) in enumerate(runs.items()):
        style = dict(label=name, color=matplotlib.colormaps["tab20"](i), linewidth=1.5)
        rows = [row for row in of_router[0].curve if row["split"] == SPLIT]
        axes[0].plot([row["step"] for row in rows], [row["loss"] for row in rows], **style)
        rows = read_rows(of_router[0].path, "metrics")
        layers = [key for key in rows[0] if key.endswith("/load_cv")]
        axes[1].plot([row["step"] for row in rows], [mean([row[key] for key in layers]) for row in rows], **style)
    axes[0].set(xlabel="step", ylabel="validation loss, nats per token", title="those that look ahead are too low")
    axes[1].set(xlabel="step", ylabel="load CV, mean over layers", title="how uneven the experts' load is")
    axes[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


if __name__ == "__main__":
    main()
