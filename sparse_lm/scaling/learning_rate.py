"""Finds the learning rate of each side, so that a comparison is not one with an untuned twin."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sparse_lm.config import Config, resolve
from sparse_lm.errors import RunFailed
from sparse_lm.scaling.outcome import SPLIT, load_finished_run

log = logging.getLogger("sparse_lm")

GRID = (0.5, 1.0, 2.0)  # times the config's learning rate
TRIALS = 9  # of a side at most: a factor of 64 to one end


def find_best_learning_rate(
    config: Config, train: Callable[[Config, str], Any], folder: str, side: str
) -> dict[str, Any]:
    """Trains a config at each learning rate of a small grid, and picks the rate of the lowest validation loss.

    While the best rate is at the edge of the grid, the grid grows by a factor of 2, up to `TRIALS` rates. A run that
    fails or ends with a loss that is not finite counts as infinite loss.

    Args:
        config: to train.
        train: (config, folder) -> anything; leaves a finished run in the folder.
        folder: for the runs.
        side: the name of the model, for log messages.

    Returns:
        `{"best": rate, "run": its folder, "losses": [[rate, loss or None], …], "enclosed": whether rates on both sides
        of the best do worse}`.

    Raises:
        RunFailed: if no rate gives a finite loss.
    """
    losses: dict[float, float] = {}
    folder_of = lambda rate: f"{folder}/learning-rate-{rate:.3g}"

    def measure_loss(rate: float) -> None:
        log.info("learning rate %.3g, %s model", rate, side)
        try:
            train(with_learning_rate(config, rate), folder_of(rate))
            loss = load_finished_run(folder_of(rate)).loss(SPLIT)
        except RunFailed as error:
            log.warning("%s", error)
            loss = math.nan
        losses[rate] = math.inf if math.isnan(loss) else loss

    for factor in GRID:
        measure_loss(factor * config.optimizer.learning_rate)
    find_best = lambda: min(losses, key=losses.get)
    while len(losses) < TRIALS and (best := find_best()) in (min(losses), max(losses)):
        measure_loss(2 * best if best == max(losses) else best / 2)
    best = find_best()
    if math.isinf(losses[best]):
        raise RunFailed(f"{folder}: no learning rate of {', '.join(f'{rate:.3g}' for rate in sorted(losses))} trained")
    tried = [[rate, None if math.isinf(losses[rate]) else losses[rate]] for rate in sorted(losses)]
    enclosed = min(losses) < best < max(losses)
    return {"best": best, "run": folder_of(best), "losses": tried, "enclosed": enclosed}


def with_learning_rate(config: Config, rate: float) -> Config:
    return resolve(replace(config, optimizer=replace(config.optimizer, learning_rate=rate)))
