"""What happens beside the steps of a run: measures, evaluation, checkpoints, stopping. `train` puts them together."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from sparse_lm import config as configs
from sparse_lm import cost, data
from sparse_lm.errors import RunFailed, Stopped
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.clock import Clock
from sparse_lm.runs.folder import RunFolder
from sparse_lm.runs.loop import Moment
from sparse_lm.runs.measures import RowMeasures, evaluate_rows, metrics_row, summarize_rows
from sparse_lm.runs.progress import Progress
from sparse_lm.runs.sinks import TensorBoard
from sparse_lm.runs.snapshot import snapshot
from sparse_lm.runs.stopping import StopSignal
from sparse_lm.stack import Stack
from sparse_lm.step.build import Build
from sparse_lm.step.state import TrainState, count_tokens


@dataclass(kw_only=True)
class Rows:
    """Where rows of figures go: the folder's tables and, where it is asked for, TensorBoard."""

    folder: RunFolder
    board: TensorBoard | None

    def add_measures(self, row: dict[str, Any]) -> None:
        self.folder.append("metrics", row)
        if self.board:
            self.board.write("train", row)

    def add_evaluation(self, split: str, row: dict[str, Any]) -> None:
        self.folder.append("eval", {"split": split, **row})
        if self.board:
            self.board.write(split, row)


@dataclass(kw_only=True)
class Measure:
    """Writes down and shows a step's metrics, with the speed since the last time."""

    stack: Stack
    rows: Rows
    clock: Clock
    batches: data.Prefetch
    progress: Progress
    start: TrainState  # which this process begins with

    def __post_init__(self):
        self._skipped = int(self.start.skipped)
        # At the last row: seconds, seconds waited, tokens.
        tokens = count_tokens(np.asarray(self.start.tokens))
        self._last = (self.clock.seconds, self.batches.wait_seconds, tokens)

    def __call__(self, moment: Moment) -> None:
        row = metrics_row(self.stack, moment.step, moment.metrics)
        now = (self.clock.seconds, self.batches.wait_seconds, row["tokens"])
        passed, waited, tokens = (new - old for new, old in zip(now, self._last))
        row["seconds"] = now[0]
        row["tokens_per_second"] = tokens / max(passed, 1e-9)
        row["data_wait"] = min(waited / max(passed, 1e-9), 1.0)
        self._last = now
        self.rows.add_measures(row)
        self.progress.show(row)
        if row["skipped"] > self._skipped:
            skipped = f"{row['skipped']} steps skipped so far, their gradient was not finite"
            self.progress.say(f"step {moment.step}: {skipped}")
            self._skipped = row["skipped"]


@dataclass(kw_only=True)
class CheckFinite:
    """Ends a run whose gradient is not finite in too many steps in a row."""

    path: epath.Path
    limit: int

    def __call__(self, moment: Moment) -> None:
        if (in_a_row := int(moment.metrics["skipped_in_a_row"])) >= self.limit:
            raise RunFailed(
                f"{self.path}: up to step {moment.step} the gradient was not finite {in_a_row} times in a row "
                f"(training.max_skipped is {self.limit}); the last checkpoint is kept; a lower optimizer.learning_rate "
                f"in a new --workdir with --init-from={self.path} may help"
            )


def check_owner(folder: RunFolder) -> None:
    """Raises `RunFailed` where the run's folder may be another process's by now, so that no more is written to it."""
    if lost := folder.lost:
        raise RunFailed(lost)


@dataclass(kw_only=True)
class Evaluate:
    """Measures the splits on held-out text, and remembers the last of these evaluations."""

    program: Build
    corpus: data.Corpus
    splits: list[str]
    rows: Rows
    clock: Clock
    start: int  # steps done when this process begins

    def __post_init__(self):
        rows = [dict(row) for row in self.rows.folder.rows("eval") if row["step"] == self.start]
        self.step = self.start if rows else -1
        self.measured = {row.pop("split"): row for row in rows}  # by split

    def __call__(self, moment: Moment) -> None:
        jax.block_until_ready(moment.state)
        seconds, state = self.clock.seconds, moment.state
        with self.clock.phase("evaluation", f"the evaluation after step {moment.step}"):
            count = self.program.config.evaluation.rows
            evaluated = evaluate_rows(self.program, self.corpus, state.parameters, state.router, self.splits, count)
        measured = summarize_rows(self.program.config.model, evaluated)
        self.step = moment.step
        self.measured = {s: {"step": moment.step, **values, "seconds": seconds} for s, values in measured.items()}
        for split, row in self.measured.items():
            self.rows.add_evaluation(split, row)


@dataclass(kw_only=True)
class Save:
    """Starts to save a checkpoint; the rows up to its step are stored before."""

    program: Build
    folder: RunFolder
    checkpoints: Checkpoints
    clock: Clock
    batches: data.Prefetch
    evaluation: Evaluate

    def __call__(self, moment: Moment) -> None:
        jax.block_until_ready(moment.state)
        check_owner(self.folder)  # an evaluation may have taken long
        with self.clock.phase("checkpoints", f"the checkpoint of step {moment.step}"):
            self.folder.flush()
            known = self.evaluation.step == moment.step
            loss = self.evaluation.measured.get("validation", {}).get("loss") if known else None
            meta = {"seconds": self.clock.spent, "waited": self.batches.wait_seconds}
            self.checkpoints.save(moment.step, snapshot(self.program, moment.state), meta, loss)


@dataclass(kw_only=True)
class Leave:
    """Saves and ends the run where a signal asks for it, unless it ends anyway."""

    path: epath.Path
    steps: int
    signal: StopSignal
    save: Save

    def __call__(self, moment: Moment) -> None:
        number = self.signal.requested(moment.step)
        if number is None or moment.last:
            return
        self.save(moment)
        self.save.checkpoints.wait()
        raise Stopped(
            f"{self.path}: stopped after step {moment.step} of {self.steps}, and saved; the same command goes on",
            self.signal.exit_code,
        )


def summarize(
    config: configs.Config, state: TrainState, clock: Clock, waited: float, evaluated: dict[str, RowMeasures]
) -> dict[str, Any]:
    """What summary.json says of a run that has ended; times in seconds.

    Args:
        config, state, clock: the run's.
        waited: seconds that it waited for data.
        evaluated: the rows of each split, by its name, after the last step.
    """
    seconds, tokens = clock.seconds, count_tokens(np.asarray(state.tokens))
    parameters = cost.count_parameters(config.model)
    return {
        "name": config.name,
        "steps": int(state.step),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / max(seconds, 1e-9),
        "compile_seconds": clock.spent["compilation"],
        "goodput": clock.goodput,
        "data_wait": min(waited / max(seconds, 1e-9), 1.0),
        "seconds_by_phase": clock.spent,
        "skipped_steps": int(state.skipped),
        "evaluation": summarize_rows(config.model, evaluated),
        "parameters": {"total": parameters.total, "active": parameters.active},
    }
