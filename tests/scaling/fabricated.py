"""Run folders as training leaves them, with losses that a test chooses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sparse_lm import config as configs
from sparse_lm.cost import count_parameters

Loss = Callable[[configs.Config, str, int], float]  # (config, split, step) -> nats per token


def config(**fields) -> configs.Config:
    """A sparse config of 100 steps, evaluated every 10."""
    made = configs.Config(name="tiny")
    made.model = configs.Model(vocabulary=64, width=32, layers=2, heads=2, ffn_width=64, experts=4)
    made.data.length, made.training.batch, made.training.steps, made.evaluation.every = 16, 4, 100, 10
    made.optimizer.learning_rate = 0.01
    for path, value in fields.items():
        part, name = path.split("__")
        setattr(getattr(made, part), name, value)
    return configs.resolve(made)


def store(
    config: configs.Config,
    folder: str,
    loss: Loss,
    step_seconds: float = 0.1,
    fingerprint: str = "f00d",
    rows: Callable[[configs.Config, str], np.ndarray] | None = None,
) -> None:
    """Writes the folder of a finished run; with rows: what the loss of each differs by from loss, in nats per token."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    steps, splits = config.training.steps, config.evaluation.splits

    def measured(split: str, step: int) -> dict:
        value = loss(config, split, step)
        value = None if value != value else value
        return {"loss": value, "bits_per_byte": value and value / 2, "loss_train_capacity": value and value + 0.01}

    curve = [
        {"step": step, "split": split, **measured(split, step), "tokens": step * 64, "seconds": step * step_seconds}
        for step in range(config.evaluation.every, steps + 1, config.evaluation.every)
        for split in splits
    ]
    counted = count_parameters(config.model)
    tokens = steps * config.training.batch * config.data.length
    summary = {
        "steps": steps,
        "tokens": tokens,
        "seconds": steps * step_seconds,
        "tokens_per_second": tokens / (steps * step_seconds),
        "compile_seconds": 1.0,
        "goodput": 0.9,
        "data_wait": 0.0,
        "skipped_steps": 0,
        "evaluation": {split: measured(split, steps) for split in splits},
        "parameters": {"total": counted.total, "active": counted.active},
        "fingerprint": fingerprint,
        "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
    }
    stored = json.dumps({"config": configs.to_dict(config), "fingerprint": fingerprint})
    (path / "config.json").write_text(stored.replace("Infinity", "1e999"))
    (path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (path / "metrics.jsonl").write_text("")
    (path / "summary.json").write_text(json.dumps(summary))
    if rows:
        arrays = {}
        for split in splits:
            losses = loss(config, split, steps) + rows(config, split)
            place = np.stack([0 * losses, np.arange(len(losses))[::-1]], axis=1).astype(np.int64)
            arrays[f"{split}/tokens"] = np.full(len(losses), 16)
            arrays |= {f"{split}/cross_entropy": 16 * losses.astype(np.float32), f"{split}/place": place}
        np.savez(path / "evaluation_rows.npz", **arrays)


class Trainer:
    """A `train` that stores what `loss` says, and remembers in which order it was called."""

    def __init__(self, loss: Loss, **options):
        self.loss, self.options, self.calls = loss, options, []

    def __call__(self, config: configs.Config, folder: str) -> None:
        self.calls.append((config, folder))
        store(config, folder, self.loss, **self.options)
