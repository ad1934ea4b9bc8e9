"""One step of a run again: what one needs when a loss spikes."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.errors import UserError
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.run import on_these_devices, same_corpus, use_compilation_cache
from sparse_lm.training.build import build
from sparse_lm.training.checkpoints import Checkpoints
from sparse_lm.training.measures import metrics_row
from sparse_lm.training.run_folder import read_config, read_info, read_rows
from sparse_lm.training.snapshot import initial_state, restore_state


class Replayed(NamedTuple):
    """A step that was run again."""

    row: dict[str, Any]  # as in metrics.jsonl
    logged: dict[str, Any] | None  # the row that the run itself wrote, if it wrote one at this step
    batch: dict[str, np.ndarray]  # inputs, targets, segments, positions, [B, L]
    token_losses: np.ndarray  # nats, [B, L], 0 for padding
    experts: dict[int, np.ndarray]  # by expert layer: those chosen, [B, L, K], -1 for padding
    tokenizer: Any


def replay(workdir: str, step: int) -> Replayed:
    """Runs the step of a run again, from the newest checkpoint before it or from the beginning. The run stays as it is.

    Raises `UserError` for a step that the run does not have.
    """
    config = on_these_devices(read_config(workdir))
    if not 1 <= step <= config.training.steps:
        raise UserError(f"--step is {step}; {workdir} has steps 1 to {config.training.steps}")
    use_compilation_cache(config)
    program, corpus = build(config, make_mesh(config.mesh)), same_corpus(config, workdir)
    rows, place = config.training.batch, sharding(program.mesh, "batch")
    batches = corpus.train(config.training.seed, rows)
    with Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        before = max((saved for saved in checkpoints.steps() if saved < step), default=0)
        init_from = read_info(workdir)["init_from"]
        state = restore_state(program, checkpoints, before) if before else initial_state(program, init_from)
    for done in range(before, step - 1):
        state, _ = program.step(state, data.device_batch(batches, done, rows, place))
    batch = data.device_batch(batches, step - 1, rows, place)
    _, metrics, seen = jax.device_get(program.record(state, batch))
    logged = next((row for row in read_rows(workdir, "metrics") if row["step"] == step), None)
    return Replayed(
        metrics_row(config.model, step, metrics),
        logged,
        jax.device_get(batch),
        _whole(seen["token_losses"], config.data.length),
        _by_layer(config, seen["experts"]),
        corpus.tokenizer,
    )


def _whole(parts: np.ndarray, length: int) -> np.ndarray:
    """[parts, B / parts, L, …], in the order of `accumulate`, as the [B, L, …] that was divided."""
    return parts.swapaxes(0, 1).reshape(-1, length, *parts.shape[3:])


def _by_layer(config: configs.Config, experts: np.ndarray | None) -> dict[int, np.ndarray]:
    if experts is None:
        return {}
    model, length = config.model, config.data.length
    parts = experts.shape[0]
    by_place = experts.reshape(parts, model.periods, -1, length, model.top_k).swapaxes(0, 1)
    layers = [layer for layer in range(model.layers) if model.is_expert_layer(layer)]
    return {layer: _whole(chosen, length) for layer, chosen in zip(layers, by_place)}


def describe(replayed: Replayed, rows: int = 4, characters: int = 400) -> str:
    """The step in words: its figures beside those logged, the rows of the largest loss with their text, and loads."""
    lines = [f"step {replayed.row['step']}, run again" + ("" if replayed.logged else " (the run logged no row here)")]
    for name, value in replayed.row.items():
        if isinstance(value, float):
            logged = (replayed.logged or {}).get(name)
            lines.append(f"  {name:32} {value:12.6g}" + (f"   logged {logged:12.6g}" if logged is not None else ""))
    for layer, chosen in replayed.experts.items():
        named = chosen[chosen >= 0]
        count = np.bincount(named)
        lines.append(f"tokens of each expert in layer {layer}: {' '.join(map(str, count))}")
    valid = replayed.batch["segments"] > 0
    losses = replayed.token_losses.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)
    for row in np.argsort(-losses)[:rows]:
        ids = replayed.batch["targets"][row][valid[row]]
        worst = int(replayed.token_losses[row].argmax())
        token = replayed.tokenizer.decode([int(replayed.batch["targets"][row][worst])])
        text = replayed.tokenizer.decode([int(i) for i in ids])[:characters]
        lines.append(
            f"row {row}: mean loss {losses[row]:.3f}; largest {replayed.token_losses[row, worst]:.3f} on {token!r}"
        )
        lines.append(f"  {text!r}")
    return "\n".join(lines)
