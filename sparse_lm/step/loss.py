"""The loss of a batch as sums over its tokens, so that parts of a batch add up to the whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from sparse_lm.mesh import constrain
from sparse_lm.models import Context, Functional

Batch = dict[str, jax.Array]  # inputs, targets, segments, positions [B, L] int32; bytes [B] int32


def packed_context(batch: Batch, capacity_factor: float) -> Context:
    """What layers are told of packed rows; segment 0 is padding."""
    return Context(batch["inputs"], batch["segments"], batch["positions"], capacity_factor)


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
    replay: Any = None,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Summed loss to be differentiated, and what it consists of: `sums` (add up over parts of a batch: cross_entropy,
    balance_loss, z_loss, tokens, bytes, statistics of each expert layer), `token_losses` and `chosen` (do not)."""
    context = packed_context(batch, capacity_factor)
    logits, aux, _ = functional.apply(parameters, batch["inputs"], context, router_state, key, replay)
    with jax.named_scope("output"):
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
    return total, {"sums": sums, "token_losses": losses, "chosen": None if aux is None else aux.chosen}


def choose_experts(
    parameters: dict,
    functional: Functional,
    router_state: Any,
    batch: Batch,
    capacity_factor: float,
    key: jax.Array,
    parts: int,
) -> Int[Array, "parts n G X Y"]:
    """What the routers choose in a step with this batch and key, by forward passes alone."""

    def part(batch, key, replay):
        context = packed_context(batch, capacity_factor)
        return {}, functional.apply(parameters, batch["inputs"], context, router_state, key).aux.chosen

    return accumulate(part, batch, key, None, parts)[1]


def accumulate(part: Callable, batch: Batch, key: jax.Array, replay: Any, parts: int) -> tuple[Any, Any]:
    """part(batch, key, replay) -> (to add up, to stack), over the parts of a batch: the gradient of a whole batch with
    the memory of one part. Row r is in part r mod parts, so that every device keeps the rows that it has.
    """
    split = lambda x: constrain(
        x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, "batch", *[None] * (x.ndim - 1)
    )
    inputs = (jax.tree.map(split, batch), jax.random.split(key, parts), replay)
    if parts == 1:
        total, seen = part(*jax.tree.map(lambda x: x[0], inputs))
        return total, jax.tree.map(lambda x: x[None], seen)
    shapes = jax.eval_shape(lambda i: part(*jax.tree.map(lambda x: x[0], i))[0], inputs)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, inputs):
        one, seen = part(*inputs)
        return jax.tree.map(jnp.add, total, one), seen

    return jax.lax.scan(add, zeros, inputs)
