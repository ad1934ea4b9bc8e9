"""What happens beside the steps of a run: measures, evaluation, checkpoints, and stopping."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sparse_lm import cost, data
from sparse_lm.errors import RunFailed, Stopped
from sparse_lm.training.build import Build, TrainState, count_tokens
from sparse_lm.training.checkpoints import Checkpoints
from sparse_lm.training.clock import Clock
from sparse_lm.training.loop import Action, Moment
from sparse_lm.training.measures import evaluate, metrics_row
from sparse_lm.training.progress import Progress
from sparse_lm.training.run_folder import RunFolder
from sparse_lm.training.snapshot import snapshot
from sparse_lm.training.stopping import StopSignal
from sparse_lm.training.tensorboard import TensorBoard
from sparse_lm.training.watchdog import Watchdog


@dataclass
class Actions:
    program: Build
    corpus: data.Corpus
    splits: list[str]
    folder: RunFolder
    checkpoints: Checkpoints
    clock: Clock
    progress: Progress
    batches: data.Prefetch
    board: TensorBoard | None
    signal: StopSignal
    watchdog: Watchdog
    info: dict[str, Any]  # for the summary
    waited: float  # seconds that earlier processes of the run waited for data
    start: TrainState  # which this process begins with

    def __post_init__(self):
        step = int(self.start.step)
        rows = [dict(row) for row in self.folder.rows("eval") if row["step"] == step]
        # The last evaluation: step, and measures by split.
        self.evaluated = (step, {row.pop("split"): row for row in rows}) if rows else (-1, {})
        self.skipped = int(self.start.skipped)
        # At the last row of metrics: seconds, seconds waited, tokens.
        self.window = (self.clock.seconds, 0.0, count_tokens(np.asarray(self.start.tokens)))

    def pairs(self) -> list[tuple[int, Action]]:
        config = self.program.config
        # Several processes have to ask about a signal at the same steps, and asking costs them a message.
        ask = 1 if jax.process_count() == 1 else config.logging.every
        return [
            (config.logging.every, self.measure),
            (min(config.logging.every, config.training.max_skipped), self.check),
            (config.evaluation.every, self.evaluate),
            (config.checkpoints.every or config.training.steps, self.save),
            (ask, self.leave),
        ]

    def measure(self, moment: Moment) -> None:
        row = metrics_row(self.program.config.model, moment.step, moment.metrics)
        now = (self.clock.seconds, self.batches.wait_seconds, row["tokens"])
        passed, waited, tokens = (new - old for new, old in zip(now, self.window))
        row["seconds"] = now[0]
        row["tokens_per_second"] = tokens / max(passed, 1e-9)
        row["data_wait"] = min(waited / max(passed, 1e-9), 1.0)
        self.window = now
        self.folder.append("metrics", row)
        if self.board:
            self.board.write("train", row)
        self.progress.show(row)
        if row["skipped"] > self.skipped:
            self.progress.say(
                f"step {moment.step}: {row['skipped']} steps skipped so far, their gradient was not finite"
            )
            self.skipped = row["skipped"]

    def check(self, moment: Moment) -> None:
        in_a_row, limit = int(moment.metrics["skipped_in_a_row"]), self.program.config.training.max_skipped
        if in_a_row >= limit:
            raise RunFailed(
                f"{self.folder.path}: up to step {moment.step} the gradient was not finite {in_a_row} times in a row "
                f"(training.max_skipped is {limit}); the last checkpoint is kept; a lower optimizer.learning_rate in a "
                f"new --workdir with --init-from={self.folder.path} may help"
            )

    def evaluate(self, moment: Moment) -> None:
        jax.block_until_ready(moment.state)
        seconds = self.clock.seconds
        self.watchdog.beat(f"the evaluation after step {moment.step}")
        with self.clock.phase("evaluation"):
            measured = evaluate(self.program, self.corpus, moment.state.parameters, moment.state.router, self.splits)
        rows = {split: {"step": moment.step, **values, "seconds": seconds} for split, values in measured.items()}
        self.evaluated = (moment.step, rows)
        for split, row in rows.items():
            self.folder.append("eval", {"split": split, **row})
            if self.board:
                self.board.write(split, row)

    def save(self, moment: Moment) -> None:
        jax.block_until_ready(moment.state)
        self.watchdog.beat(f"the checkpoint of step {moment.step}")
        with self.clock.phase("checkpoints"):
            self.folder.flush()
            step, measured = self.evaluated
            loss = measured.get("validation", {}).get("loss") if step == moment.step else None
            meta = {"seconds": self.clock.spent, "waited": self.waited + self.batches.wait_seconds}
            self.checkpoints.save(moment.step, snapshot(self.program, moment.state), meta, loss)

    def leave(self, moment: Moment) -> None:
        number = self.signal.requested(moment.step)
        if number is None or moment.last:
            return
        self.save(moment)
        self.checkpoints.wait()
        steps = self.program.config.training.steps
        raise Stopped(
            f"{self.folder.path}: stopped after step {moment.step} of {steps}, and saved; the same command goes on",
            self.signal.exit_code,
        )

    def summary(self, state: TrainState) -> dict[str, Any]:
        """What summary.json says; times in seconds."""
        config, seconds = self.program.config, self.clock.seconds
        tokens, parameters = count_tokens(np.asarray(state.tokens)), cost.parameters(config.model)
        return {
            "name": config.name,
            "steps": int(state.step),
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / max(seconds, 1e-9),
            "compile_seconds": self.clock.spent["compilation"],
            "goodput": self.clock.goodput,
            "data_wait": min((self.waited + self.batches.wait_seconds) / max(seconds, 1e-9), 1.0),
            "seconds_by_phase": self.clock.spent,
            "skipped_steps": int(state.skipped),
            "evaluation": self.evaluated[1],
            "parameters": {"total": parameters.total, "active": parameters.active},
            **self.info,
        }
