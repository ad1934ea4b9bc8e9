"""Noisy top-k: trained noise decides who is chosen while training (Shazeer et al. 2017, arXiv 1701.06538)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparse_lm import config as configs
from sparse_lm.ranges import NotNegative
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.losses import by_region
from sparse_lm.routing.router import (
    LearnedRouter,
    check_several,
    choose_top,
    gather_chosen,
    kernel,
    largest_k,
    scores,
    token_choice,
)


class NoisyTopK(LearnedRouter):
    """Top-k routing by noisy scores.

    H(x) = x W_g + ε softplus(x W_noise) with ε normal, one for each expert, while training and 0 otherwise; a token
    goes to the k experts of the largest entries of H, and their weights are the softmax over these (equations 3 to 5).
    Both losses are squared coefficients of variation over the experts, with the variance of a population, of each
    region of `model.balance_over`, times its tokens; the paper's is of the batch.

    Where the paper leaves room: 0.01 is added to the softplus, so that the noise never vanishes and equation 9 never
    divides by 0. Without noise the load is estimated by the same equation. The paper starts both matrices at zero, so
    that the first loads are about equal; here they start at a hundredth of the size of other matrices: the scores are
    then far below the noise, whose deviation is ln 2, but no two experts are alike, and optimizers whose steps are a
    share of the weights can move them.

    importance_loss: w of equation 7, on the sums of the weights that each expert is given.
    load_loss: w of equation 11, on the expected numbers of tokens of each expert, were its own noise drawn again.

    Raises `UserError` for one expert per token, whose weight would be 1; the paper has k above 1 too (section 2.1).
    """

    def __init__(
        self, model: configs.Model, rngs: nnx.Rngs, *, importance_loss: NotNegative = 0.1, load_loss: NotNegative = 0.1
    ):
        check_several(model)
        small = dataclasses.replace(model, init_scale=1e-4 * model.init_scale)
        super().__init__(small, rngs)
        self.noise = kernel(small, rngs)
        self.importance_loss, self.load_loss = importance_loss, load_loss

    def route(self, x, ids, valid, state, key=None, replay=None):
        clean = self.logits(x)
        spread = jax.nn.softplus(scores(x, self.noise)) + 0.01
        noisy = clean if key is None else clean + spread * jax.random.normal(key, clean.shape)
        expert = choose_top(noisy, self.top_k, replay)
        choice = token_choice(expert, jax.nn.softmax(gather_chosen(noisy, expert)), valid)
        importance = (jax.nn.one_hot(choice.expert, self.experts) * choice.weight[..., None]).sum(axis=(1, 2))
        named = jnp.where(valid[..., None], chance(clean, noisy, spread, self.top_k), 0)
        losses = {
            "importance_loss": self.importance_loss * unevenness(importance, valid, self.over),
            "load_loss": self.load_loss * unevenness(named.sum(axis=1), valid, self.over),
        }
        return Routing(choice, losses, measure(clean, choice, valid, self.over))


def chance(
    clean: Float[Array, "G S E"], noisy: Float[Array, "G S E"], spread: Float[Array, "G S E"], k: int
) -> Float[Array, "G S E"]:
    """The probability that an expert is among the k chosen if its noise alone is drawn again (equations 8 and 9)."""
    if k == clean.shape[-1]:
        return jnp.ones_like(clean)
    highest = largest_k(noisy, k + 1)[0]
    kth, after = highest[..., -2:-1], highest[..., -1:]
    kth_excluding = jnp.where(noisy > after, after, kth)
    return jax.scipy.special.ndtr((clean - kth_excluding) / spread)


def unevenness(load: Float[Array, "G E"], valid: Bool[Array, "G S"], over: str) -> Float[Array, ""]:
    """The squared coefficient of variation of each region's loads, times the region's tokens, summed."""
    tokens, load = by_region(valid.sum(axis=1).astype(jnp.float32), over), by_region(load, over)
    return (tokens * load.var(axis=-1) / jnp.maximum(load.mean(axis=-1), 1e-9) ** 2).sum()
