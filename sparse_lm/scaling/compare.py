"""Trains a sparse model and its dense twin, and compares them."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_lm.config import Config, resolve
from sparse_lm.cost.twin import dense_twin
from sparse_lm.errors import UserError
from sparse_lm.paths import user_path
from sparse_lm.runs.processes import ask_primary
from sparse_lm.scaling.learning_rate import find_best_learning_rate, with_learning_rate
from sparse_lm.scaling.outcome import SPLIT, compare_sides, load_finished_run
from sparse_lm.scaling.report import write_report

log = logging.getLogger("sparse_lm")

Train = Callable[[Config, str], Any]


def compare(
    config: Config, train: Train, workdir: str, seeds: int = 1, sweep: bool = False, price_per_hour: float | None = None
) -> dict[str, Any]:
    """Trains a sparse config and its dense twin on the same batches in the same order, and compares them.

    The sides take turns in going first, so that a machine that slows down is fair to both.

    Args:
        config: of the sparse model.
        train: (config, folder) -> anything; leaves a finished run in the folder, and does not train it again.
        workdir: the folder for comparison.json, comparison.md and comparison.png, and for the runs, in sparse-seed<s>
            and dense-seed<s>, and of a sweep in sweep/<side>/learning-rate-<rate>, where each side's best is its first.
        seeds: runs of each side. With several, differences are judged against the noise between them.
        sweep: whether each side first finds its own learning rate.
        price_per_hour: of all devices together, in any currency.

    Returns:
        The content of comparison.json.

    Raises:
        UserError: for an invalid or dense config.
        RunFailed: if no learning rate of a sweep gives a finite loss.
    """
    config = resolve(config)
    if SPLIT not in config.evaluation.splits:
        raise UserError(f"evaluation.splits is {config.evaluation.splits}; a comparison needs {SPLIT!r} among them")
    configs = {"dense": dense_twin(config), "sparse": config}
    swept = None
    if sweep:
        swept = {}
        for side, untuned in configs.items():
            swept[side] = find_best_learning_rate(untuned, train, f"{workdir}/sweep/{side}", side)
            configs[side] = with_learning_rate(untuned, swept[side]["best"])
    runs = {side: [] for side in configs}
    for seed in range(seeds):
        for side in configs if seed % 2 == 0 else reversed(configs):
            log.info("seed %d of %d, %s model", seed + 1, seeds, side)
            if swept and seed == 0:  # which was the seed of the sweep
                folder = swept[side]["run"]
            else:
                folder = f"{workdir}/{side}-seed{seed}"
                train(_with_seed(configs[side], config.training.seed + seed), folder)
            runs[side].append(load_finished_run(folder))
    result = {"config": config.name, "sweep": swept, **compare_sides(runs, price_per_hour)}
    ask_primary("report", lambda: write_report(result, runs, user_path(workdir)))
    return result


def compare_runs(a: str, b: str, workdir: str = "", price_per_hour: float | None = None) -> dict[str, Any]:
    """Compares two finished runs without training.

    The sides are named `dense` and `sparse` if there is one run of each kind, otherwise `a` and `b`. The first is the
    baseline.

    Args:
        a: the folder of a run.
        b: the folder of another run.
        workdir: the folder for comparison.json, comparison.md and comparison.png; "": none is written.
        price_per_hour: of all devices together, in any currency.

    Returns:
        The content of comparison.json.

    Raises:
        UserError: if a run is not finished, or the runs are not on the same text.
    """
    runs = [load_finished_run(a), load_finished_run(b)]
    names = ["sparse" if run.config.model.sparse else "dense" for run in runs]
    if names[0] == names[1]:
        names = ["a", "b"]
    sides = dict(sorted(zip(names, ([run] for run in runs), strict=True)))  # dense, the baseline, before sparse
    result = {"config": " and ".join(filter(None, (run.config.name for run in runs))), "sweep": None}
    result |= compare_sides(sides, price_per_hour)
    if workdir:
        write_report(result, sides, user_path(workdir))
    return result


def _with_seed(config: Config, seed: int) -> Config:
    return resolve(replace(config, training=replace(config.training, seed=seed)))
