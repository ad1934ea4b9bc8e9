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
EXTENSIONS = 2  # how often the grid may grow if its edge is the best


def find_best_learning_rate(
    config: Config, train: Callable[[Config, str], Any], folder: str, side: str
) -> dict[str, Any]:
    """Trains a config at each learning rate of a small grid, and picks the rate of the lowest validation loss.

    If the best rate is at the edge of the grid, the grid grows by a factor of 2, at most `EXTENSIONS` times. A run that
    fails or ends with a loss that is not finite counts as infinite loss.

    Args:
        config: to train.
        train: (config, folder) -> anything; leaves a finished run in the folder.
        folder: for the runs.
        side: the name of the model, for log messages.

    Returns:
        `{"best": rate, "losses": [[rate, loss or None], …], "at_edge": bool}`.

    Raises:
        RunFailed: if no rate gives a finite loss.
    """
    losses: dict[float, float] = {}

    def measure_loss(rate: float) -> None:
        log.info("learning rate %.3g, %s model", rate, side)
        run = f"{folder}/learning-rate-{rate:.3g}"
        try:
            train(with_learning_rate(config, rate), run)
            loss = load_finished_run(run).loss(SPLIT)
        except RunFailed as error:
            log.warning("%s", error)
            loss = math.nan
        losses[rate] = math.inf if math.isnan(loss) else loss

    for factor in GRID:
        measure_loss(factor * config.optimizer.learning_rate)
    for _ in range(EXTENSIONS):
        best = min(losses, key=losses.get)
        if best == max(losses):
            measure_loss(2 * best)
        elif best == min(losses):
            measure_loss(best / 2)
    best = min(losses, key=losses.get)
    if math.isinf(losses[best]):
        raise RunFailed(f"{folder}: no learning rate of {', '.join(f'{rate:.3g}' for rate in sorted(losses))} trained")
    tried = [[rate, None if math.isinf(losses[rate]) else losses[rate]] for rate in sorted(losses)]
    return {"best": best, "losses": tried, "at_edge": best in (min(losses), max(losses))}


def with_learning_rate(config: Config, rate: float) -> Config:
    return resolve(replace(config, optimizer=replace(config.optimizer, learning_rate=rate)))
