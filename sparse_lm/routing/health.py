"""Routing health: what every routed layer measures, always.

Statistics are sums over tokens, so those of microbatches, groups and devices add up to the batch's. `health` turns the
sums into the figures that are logged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.routing.choice import Choice, ExpertChoice, TokenChoice
from sparse_lm.routing.losses import by_region


def measure(
    logits: Float[Array, "G S E"], choice: Choice, valid: Bool[Array, "G S"], over: str
) -> dict[str, jax.Array]:
    """The sums behind `health`, over valid tokens: all [] but `load`, what each expert is given, [E].

    logits: the router's scores before any normalization; zeros where it has none. over: the region that `load_max` is
    measured in besides the whole batch, `model.balance_over`.
    """
    logits = jax.lax.stop_gradient(logits)
    log_probabilities = jax.nn.log_softmax(logits)
    probabilities = jnp.exp(log_probabilities)
    entropy = -(probabilities * jnp.where(probabilities > 0, log_probabilities, 0)).sum(axis=-1)
    count = lambda per_token: jnp.where(valid, per_token, 0).sum().astype(jnp.float32)
    load, named = _load(choice, valid, logits.shape[-1])
    tokens, of_region = by_region(valid.sum(axis=1), over), by_region(load, over)
    return {
        "load": load.sum(axis=0),
        "tokens": count(1.0),
        "unrouted": count(~named),
        "region_load_max": (tokens * _over_mean(of_region, of_region.max(axis=-1))).sum(),
        "entropy": count(entropy),
        "logit_square": count((logits**2).mean(axis=-1)),
        "top_probability": count(probabilities.max(axis=-1)),
    }


def _load(choice: Choice, valid: Bool[Array, "G S"], experts: int) -> tuple[Float[Array, "G E"], Bool[Array, "G S"]]:
    """What each expert is given of a group, and which tokens are given to an expert."""
    match choice:
        case TokenChoice(expert=expert):
            return jax.nn.one_hot(expert, experts).sum(axis=(1, 2)), (expert >= 0).any(axis=-1)
        case ExpertChoice(token=token):
            flat = jnp.where(token < 0, valid.shape[1], token).reshape(len(token), -1)
            times = jax.vmap(lambda index: jnp.bincount(index, length=valid.shape[1]))(flat)
            return (token >= 0).sum(axis=-1).astype(jnp.float32), times > 0
    return choice.dispatch.sum(axis=(1, 3)), valid


def _over_mean(load: Float[Array, "*N E"], x: Float[Array, "*N"]) -> Float[Array, "*N"]:
    return x / jnp.maximum(load.mean(axis=-1), 1e-9)


def health(statistics: dict[str, Array]) -> dict[str, Array]:
    """The figures of routing health, from sums over a batch; leading axes (layers) stay.

    load_max: the largest expert load over the mean, 1 when even; region_load_max: the same within a region of
    `model.balance_over`, mean over the regions; load_cv: standard deviation of the loads over their mean; dead_experts:
    share of experts with under 1 % of a fair load; dropped: share of the choices beyond capacity or a router's bound;
    unrouted: share of the tokens that no expert was chosen for; entropy: mean entropy of the softmax of the logits over
    ln E (1 for one expert); logit_rms: root mean square of the logits; top_probability: mean of the largest entry of
    that softmax.
    """
    load = statistics["load"]
    experts = load.shape[-1]
    tokens = jnp.maximum(statistics["tokens"], 1)
    beyond = statistics.get("beyond_bound", 0.0)
    choices = jnp.maximum(load.sum(axis=-1) + beyond, 1)
    return {
        "load_max": _over_mean(load, load.max(axis=-1)),
        "region_load_max": statistics["region_load_max"] / tokens,
        "load_cv": _over_mean(load, load.std(axis=-1)),
        "dead_experts": (load < 0.01 * load.mean(axis=-1, keepdims=True)).mean(axis=-1),
        "dropped": (statistics["dropped"] + beyond) / choices,
        "unrouted": statistics["unrouted"] / tokens,
        "entropy": statistics["entropy"] / tokens / jnp.log(experts) if experts > 1 else jnp.ones_like(tokens),
        "logit_rms": jnp.sqrt(statistics["logit_square"] / tokens),
        "top_probability": statistics["top_probability"] / tokens,
    }
