"""Routing health: what every routed layer measures, always.

Statistics are sums over tokens, so those of microbatches, groups and devices add up to the batch's. `health` turns the
sums into the figures that are logged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.routing.choice import TokenChoice


def measure(logits: Float[Array, "G S E"], choice: TokenChoice) -> dict[str, jax.Array]:
    """The sums behind `health`, over tokens that have a choice: all [] but `load`, the choices of each expert, [E]."""
    experts = logits.shape[-1]
    valid = (choice.expert >= 0).any(axis=-1)
    logits = jax.lax.stop_gradient(logits)
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    entropy = -(probabilities * jnp.where(probabilities > 0, log_probabilities, 0)).sum(axis=-1)
    count = lambda per_token: jnp.where(valid, per_token, 0).sum()
    return {
        "load": jax.nn.one_hot(choice.expert, experts).sum(axis=(0, 1, 2)),
        "tokens": valid.sum().astype(jnp.float32),
        "entropy": count(entropy),
        "logit_square": count((logits**2).mean(axis=-1)),
        "top_probability": count(probabilities.max(axis=-1)),
    }


def health(statistics: dict[str, Array]) -> dict[str, Array]:
    """The figures of routing health, from sums over a batch; leading axes (layers) stay.

    load_max: the largest expert load over the mean, 1 when even; load_cv: standard deviation of the loads over their
    mean; dead_experts: share of experts with under 1 % of a fair load; dropped: share of the choices beyond capacity;
    entropy: mean entropy of the router's probabilities over ln E (1 for one expert); logit_rms: root mean square of the
    logits; top_probability: mean of the largest probability.
    """
    load = statistics["load"]
    experts = load.shape[-1]
    fair = jnp.maximum(load.mean(axis=-1), 1e-9)
    tokens = jnp.maximum(statistics["tokens"], 1)
    choices = jnp.maximum(load.sum(axis=-1), 1)
    return {
        "load_max": load.max(axis=-1) / fair,
        "load_cv": load.std(axis=-1) / fair,
        "dead_experts": (load < 0.01 * fair[..., None]).mean(axis=-1),
        "dropped": statistics["dropped"] / choices,
        "entropy": statistics["entropy"] / tokens / jnp.log(experts) if experts > 1 else jnp.ones_like(tokens),
        "logit_rms": jnp.sqrt(statistics["logit_square"] / tokens),
        "top_probability": statistics["top_probability"] / tokens,
    }
