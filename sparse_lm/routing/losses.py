"""Losses that several routers share, as sums over the tokens routed, and the region that balance is a matter of."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from sparse_lm.mesh import RULES


def by_region(x: Num[Array, "G *N"], over: str) -> Num[Array, "R *N"]:
    """Sums over the groups of each region: the group itself, the groups of one device, or all of the microbatch.

    The mesh in force says how many devices the groups are divided over.
    """
    mesh = jax.sharding.get_abstract_mesh()
    devices = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in RULES["groups"])
    regions = {"group": len(x), "device": devices, "batch": 1}[over]
    return x.reshape(regions, -1, *x.shape[1:]).sum(axis=1)


def count_choices(expert: Int[Array, "G S K"], experts: int) -> Float[Array, "G E"]:
    """How many choices of a group's tokens name each expert."""
    return jax.nn.one_hot(expert, experts).sum(axis=(1, 2))


def load_balancing_loss(
    probabilities: Float[Array, "G S E"], expert: Int[Array, "G S K"], valid: Bool[Array, "G S"], over: str
) -> Float[Array, ""]:
    """The load-balancing loss E Σ_e f_e P_e of each region, times the region's tokens, summed.

    f_e is the share of the region's choices that name e and P_e the region's mean probability of e (Fedus et al. 2021,
    arXiv 2101.03961, equations 4 to 6; for K choices Zoph et al. 2022, arXiv 2202.08906). It is 1 per token when both
    are even. Over more than the group as in Qiu et al. 2025 (arXiv 2501.11873).
    """
    experts, k = probabilities.shape[-1], expert.shape[-1]
    tokens = by_region(valid.sum(axis=1).astype(jnp.float32), over)
    named = by_region(count_choices(expert, experts), over)
    probability = by_region(jnp.where(valid[..., None], probabilities, 0).sum(axis=1), over)
    return (experts * (named * probability).sum(axis=-1) / (k * jnp.maximum(tokens, 1))).sum()


def router_z_loss(logits: Float[Array, "G S E"], valid: Bool[Array, "G S"]) -> Float[Array, ""]:
    """The squared logsumexp of the logits, summed (Zoph et al. 2022, arXiv 2202.08906, equation 5)."""
    return jnp.where(valid, jax.nn.logsumexp(logits, axis=-1) ** 2, 0).sum()
