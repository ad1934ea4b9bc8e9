"""One step of a run again: what one needs when a loss spikes."""

from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.mesh import sharding
from sparse_lm.routing import TokenChoice, router_of
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.devices import build_here
from sparse_lm.runs.folder import read_config, read_rows
from sparse_lm.runs.measures import metrics_row
from sparse_lm.runs.parent import initial_state, stored_parent
from sparse_lm.runs.snapshot import restore_state
from sparse_lm.runs.text import prepare_own
from sparse_lm.stack import Stack
from sparse_lm.step.anticipation import AHEAD, step_batch


class Replayed(NamedTuple):
    """A step that was run again."""

    row: dict[str, Any]  # as in metrics.jsonl
    logged: dict[str, Any] | None  # the row that the run itself wrote, if it wrote one at this step
    batch: dict[str, np.ndarray]  # inputs, targets, segments, positions, [B, L]
    token_losses: np.ndarray  # nats, [B, L], 0 for padding
    experts_in_layer: int  # E
    experts: dict[int, np.ndarray]  # by expert layer, where tokens choose: those chosen, [B, L, K], -1 for nobody
    tokenizer: Any


def replay(workdir: epath.PathLike, step: int) -> Replayed:
    """Runs the step of a run again, from the newest checkpoint before it or from the beginning. The run stays as it is.

    It needs the text, and from the beginning the run that `--init-from` named. On another mesh than the run's, sums are
    rounded in another order, and what is measured by device differs (`model.balance_over`, `model.exchange_buffer`).

    Raises `UserError` for a step that the run does not have, and for what is needed and gone.
    """
    config, logged = read_config(workdir), read_rows(workdir, "metrics")
    with Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        done = max([*checkpoints.steps(), *(row["step"] for row in logged)], default=0)
    if not 1 <= step <= done:
        raise UserError(f"--step is {step}; {workdir} has done steps 1 to {done}")
    corpus = prepare_own(config, workdir)
    program = build_here(config, keep_batch=True)
    batches = corpus.training_batches(config.training.seed, config.training.batch)
    place = sharding(program.mesh, "batch")
    with Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        before = max((saved for saved in checkpoints.steps() if saved < step), default=0)
        if before:
            state = restore_state(program, checkpoints, before)
        else:
            state = initial_state(program, stored_parent(workdir), f"step {step} of {workdir}, run again,")
    for done in range(before, step - 1):
        state, _ = program.step(state, step_batch(config, batches, done, place))
    batch = step_batch(config, batches, step - 1, place)
    _, metrics, seen = jax.device_get(program.record(state, batch))
    return Replayed(
        metrics_row(program.functional.stack, step, metrics),
        next((row for row in logged if row["step"] == step), None),
        jax.device_get({name: rows for name, rows in batch.items() if name != AHEAD}),
        _whole(seen["token_losses"], config.data.length),
        config.model.experts,
        _by_layer(config, program.functional.stack, seen["chosen"]),
        corpus.tokenizer,
    )


def _whole(parts: np.ndarray, length: int) -> np.ndarray:
    """[parts, B / parts, L, …], in the order of `accumulate`, as the [B, L, …] that was divided."""
    return parts.swapaxes(0, 1).reshape(-1, length, *parts.shape[3:])


def _by_layer(config: configs.Config, stack: Stack, experts: np.ndarray | None) -> dict[int, np.ndarray]:
    if experts is None or router_of(config.model).form is not TokenChoice:
        return {}
    length, layers = config.data.length, stack.routed_layers
    parts = experts.shape[0]
    by_layer = experts.reshape(parts, len(layers), -1, length, experts.shape[-1]).swapaxes(0, 1)
    return {layer: _whole(chosen, length) for layer, chosen in zip(layers, by_layer)}


def describe(replayed: Replayed, rows: int = 4, characters: int = 400) -> str:
    """The step in words: its figures beside those logged, the rows of the largest loss with their text, and loads."""
    lines = [f"step {replayed.row['step']}, run again" + ("" if replayed.logged else " (the run logged no row here)")]
    for name, value in replayed.row.items():
        if isinstance(value, float):
            logged = (replayed.logged or {}).get(name)
            lines.append(f"  {name:32} {value:12.6g}" + (f"   logged {logged:12.6g}" if logged is not None else ""))
    for layer, chosen in replayed.experts.items():
        named = chosen[chosen >= 0]
        count = np.bincount(named, minlength=replayed.experts_in_layer)
        lines.append(f"tokens of each expert in layer {layer}: {' '.join(map(str, count))}")
    valid = replayed.batch["segments"] > 0
    losses = replayed.token_losses.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)
    for row in np.argsort(-np.nan_to_num(losses, nan=np.inf))[:rows]:  # the row that breaks a step first
        ids = replayed.batch["targets"][row][valid[row]]
        worst = int(np.nan_to_num(replayed.token_losses[row], nan=np.inf).argmax())
        token = replayed.tokenizer.decode([int(replayed.batch["targets"][row][worst])])
        text = replayed.tokenizer.decode([int(i) for i in ids])[:characters]
        lines.append(
            f"row {row}: mean loss {losses[row]:.3f}; largest {replayed.token_losses[row, worst]:.3f} on {token!r}"
        )
        lines.append(f"  {text!r}")
    return "\n".join(lines)
