"""A sparse model against its dense twin: trains both, and says what came out."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from etils import epath

from sparse_lm.config import Config, resolve
from sparse_lm.cost.twin import dense_twin
from sparse_lm.errors import UserError
from sparse_lm.scaling.learning_rate import find_best_learning_rate, with_learning_rate
from sparse_lm.scaling.outcome import SPLIT, compare_sides, load_finished_run
from sparse_lm.scaling.report import write_report

log = logging.getLogger("sparse_lm")

Train = Callable[[Config, str], Any]


def compare(
    config: Config, train: Train, workdir: str, seeds: int = 1, sweep: bool = False, price_per_hour: float | None = None
) -> dict[str, Any]:
    """Trains a sparse config and its dense twin on the same batches in the same order, and writes the comparison.

    Seed s of each side is trained in `workdir/sparse-seed<s>` and `workdir/dense-seed<s>`, and the sides take turns in
    going first, so that a machine that slows down is fair to both. What is finished already is not trained again, that
    being how `train` treats a finished folder. In `workdir` then are comparison.json, comparison.md and comparison.png.

    Args:
        config: of the sparse model.
        train: (config, folder) -> anything; leaves a finished run in the folder.
        seeds: runs of each side. With several, differences are judged against the noise between them.
        sweep: whether each side first finds its own learning rate.
        price_per_hour: of all devices together, in any currency.

    Returns what comparison.json holds. Raises `UserError`.
    """
    config = resolve(config)
    if SPLIT not in config.evaluation.splits:
        raise UserError(f"evaluation.splits is {config.evaluation.splits}; a comparison needs {SPLIT!r} among them")
    sides = {"dense": dense_twin(config), "sparse": config}
    swept = None
    if sweep:
        swept = {}
        for side, of in sides.items():
            swept[side] = find_best_learning_rate(of, train, f"{workdir}/sweep/{side}", side)
            sides[side] = with_learning_rate(of, swept[side]["best"])
    runs = {side: [] for side in sides}
    for seed in range(seeds):
        for side in sides if seed % 2 == 0 else reversed(sides):
            log.info("seed %d of %d, %s model", seed + 1, seeds, side)
            folder = f"{workdir}/{side}-seed{seed}"
            train(_with_seed(sides[side], config.training.seed + seed), folder)
            runs[side].append(load_finished_run(folder))
    result = {"config": config.name, "sweep": swept, **compare_sides(runs, price_per_hour)}
    write_report(result, runs, epath.Path(workdir))
    return result


def compare_runs(a: str, b: str, workdir: str = "", price_per_hour: float | None = None) -> dict[str, Any]:
    """Compares two finished runs without training, and writes the comparison if given a folder.

    The sides are called `dense` and `sparse` where one run is of either kind, otherwise `a` and `b`; the first is the
    baseline. Raises `UserError` where a run is not finished, or they are not on the same text.
    """
    runs = [load_finished_run(a), load_finished_run(b)]
    names = ["sparse" if run.config.model.sparse else "dense" for run in runs]
    if names[0] == names[1]:
        names = ["a", "b"]
    sides = dict(sorted(zip(names, ([run] for run in runs), strict=True)))  # dense, the baseline, before sparse
    result = {"config": " and ".join(filter(None, (run.config.name for run in runs))), "sweep": None}
    result |= compare_sides(sides, price_per_hour)
    if workdir:
        write_report(result, sides, epath.Path(workdir))
    return result


def _with_seed(config: Config, seed: int) -> Config:
    return resolve(replace(config, training=replace(config.training, seed=seed)))
