"""Samples the next token from logits: greedily, or with temperature, top-k and top-p."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sparse_lm.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Raises `UserError` for a value out of range."""

    temperature: float = 1.0  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # draw among this many most probable tokens; 0: all
    top_p: float = 1.0  # draw among the fewest most probable tokens with this total probability; 1: all

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or a number above")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or above")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1 (all tokens)")


def log_probabilities(logits: Float[Array, "*B V"], sampling: Sampling) -> Float[Array, "*B V"]:
    """Computes the log-probabilities that tokens are drawn with; -inf for excluded tokens.

    Temperature comes first, then top-k (Fan et al. 2018, arXiv 1805.04833), then top-p of the remaining probability
    (nucleus sampling, Holtzman et al. 2020, arXiv 1904.09751, equations 2 and 3). Of equal tokens the lower id is kept.

    Args:
        logits: of each token.
        sampling: with a temperature above 0.
    """
    logits = (logits - logits.max(axis=-1, keepdims=True)) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        ranked = jnp.take_along_axis(logits, order, axis=-1)
        if sampling.top_k:
            ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
        if sampling.top_p < 1:
            probability = jax.nn.softmax(ranked)
            before = jnp.cumsum(probability, axis=-1) - probability
            ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
        logits = jnp.take_along_axis(ranked, jnp.argsort(order, axis=-1), axis=-1)
    return jax.nn.log_softmax(logits)


@functools.partial(jax.jit, static_argnames="sampling")
def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], sampling: Sampling) -> Int[Array, "B"]:
    """Draws a token of each row with the key of the row."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    return jax.vmap(jax.random.categorical)(keys, log_probabilities(logits, sampling))
