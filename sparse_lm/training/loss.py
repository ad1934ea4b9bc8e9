"""The loss of a batch as sums over its tokens, so that parts of a batch add up to the whole."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sparse_lm.models import Context, Functional

Batch = dict[str, jax.Array]  # inputs, targets, segments, positions [B, L] int32; bytes [B] int32


def packed_context(batch: Batch, capacity_factor: float) -> Context:
    """Who attends to whom in packed rows: earlier positions of the same document. Segment 0 is padding."""
    segments = batch["segments"]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones(same.shape[1:], bool))
    return Context(batch["inputs"], segments > 0, batch["positions"], same & causal, capacity_factor)


def token_losses(logits: Float[Array, "B L V"], batch: Batch) -> Float[Array, "B L"]:
    """Cross-entropy of each target in nats, 0 for padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.where(batch["segments"] > 0, losses, 0)


def loss(
    parameters: dict,
    functional: Functional,
    router_state: Any,
    batch: Batch,
    capacity_factor: float,
    key: jax.Array | None,
    given: Int[Array, "n G S K"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Summed loss to be differentiated, and what it consists of: `sums` (add up over parts of a batch: cross_entropy,
    balance_loss, z_loss, tokens, bytes, statistics of each expert layer), `token_losses` and `experts` (do not)."""
    context = packed_context(batch, capacity_factor)
    logits, aux, _ = functional.apply(parameters, batch["inputs"], context, router_state, key, given)
    losses = token_losses(logits, batch)
    sums = {
        "cross_entropy": losses.sum(),
        "tokens": (batch["segments"] > 0).sum().astype(jnp.float32),
        "bytes": batch["bytes"].sum().astype(jnp.float32),
    }
    total = sums["cross_entropy"]
    if aux is not None:
        sums |= {name: value.sum() for name, value in aux.losses.items()} | {"statistics": aux.statistics}
        total += sum(value.sum() for value in aux.losses.values())
    return total, {"sums": sums, "token_losses": losses, "experts": None if aux is None else aux.experts}
