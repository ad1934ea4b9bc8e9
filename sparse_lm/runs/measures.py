"""The figures in the rows of metrics.jsonl and eval.jsonl."""

import math
from typing import Any

import jax
import numpy as np

from sparse_lm import config as configs
from sparse_lm import data
from sparse_lm.mesh import sharding
from sparse_lm.routing import leak
from sparse_lm.stack import Stack
from sparse_lm.step.build import Build
from sparse_lm.step.state import count_tokens

RowMeasures = dict[str, np.ndarray]  # by name, of the rows of a split

SCALARS = ("loss", "cross_entropy", "balance_loss", "z_loss", "grad_norm", "learning_rate")


def metrics_row(stack: Stack, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics as plain numbers: those of `SCALARS`, other losses of the router, counts, and the health of each
    routed layer."""
    metrics = jax.device_get(metrics)
    row = {"step": step, "tokens": count_tokens(metrics["tokens"])}
    others = set(metrics) - {"tokens", "skipped", "skipped_in_a_row", "routing"}
    row |= {name: float(metrics.get(name, 0.0)) for name in (*SCALARS, *sorted(others - set(SCALARS)))}
    row["skipped"] = int(metrics["skipped"])
    for name, values in metrics["routing"].items():
        row |= {f"routing/{layer}/{name}": float(value) for layer, value in zip(stack.routed_layers, values)}
    return row


def final_rows(evaluation: configs.Evaluation) -> int:
    """How many rows of each split are measured when training has ended, no fewer than while it went on; 0: all."""
    rows = (evaluation.rows, evaluation.final_rows)
    return 0 if 0 in rows else max(rows)


def evaluate_rows(
    program: Build, corpus: data.Corpus, parameters: dict, router: dict, splits: list[str], rows: int
) -> dict[str, RowMeasures]:
    """Sums over the tokens of each of the first rows of each split.

    Args:
        program: whose `evaluate` is run.
        corpus: the text.
        parameters, router: the model's.
        splits: of the corpus.
        rows: of each split; 0: all.

    Returns by split arrays of [rows]: `cross_entropy` in nats at the evaluation capacity,
    `cross_entropy_train_capacity` at the training capacity, `tokens`, `bytes` of text, and the `place` [rows, 2] of
    each row: its part of the corpus and number there.
    """
    training = program.config.training
    batch = training.batch // training.accumulation  # what fits a step's memory
    place = sharding(program.mesh, "batch")
    measured = {}
    for split in splits:
        batches = corpus.evaluation_batches(split, batch, rows)
        with data.Prefetch(lambda i, b=batches: data.device_batch(b, i, batch, place), 0, len(batches)) as ready:
            # One after the other, for the reason given in `digest.digests`.
            sums = [jax.device_get(program.evaluate(parameters, router, rows)) for rows in ready]
        places = batches.rows.places  # of which padding has none
        measured[split] = {n: np.concatenate([s[n] for s in sums])[: len(places)] for n in sums[0]} | {"place": places}
    return measured


def summarize_rows(model: configs.Model, evaluated: dict[str, RowMeasures]) -> dict[str, dict[str, Any]]:
    """Means over the tokens of the rows of each split.

    loss: nats per token at the evaluation capacity; loss_train_capacity: at the training capacity; bits_per_byte: of
    the text, which does not depend on the tokenizer; rows and tokens: how many; causal: whether loss is of each token
    given the earlier ones alone (`routing.leak`).
    """
    return {split: _summarize_split(model, rows) for split, rows in evaluated.items()}


def _summarize_split(model: configs.Model, rows: RowMeasures) -> dict[str, Any]:
    total = {name: float(rows[name].sum(dtype=np.float64)) for name in rows if name != "place"}
    return {
        "loss": total["cross_entropy"] / total["tokens"],
        "bits_per_byte": total["cross_entropy"] / math.log(2) / total["bytes"],
        "loss_train_capacity": total["cross_entropy_train_capacity"] / total["tokens"],
        "rows": len(rows["tokens"]),
        "tokens": int(total["tokens"]),
        "causal": not leak(model, model.eval_capacity_factor),
    }
