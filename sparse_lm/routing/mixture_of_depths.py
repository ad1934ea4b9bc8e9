"""Mixture of depths: some tokens pass a layer, the others skip it (Raposo et al. 2024, arXiv 2404.02258)."""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.ranges import NotNegative
from sparse_lm.routing.choice import ExpertChoice, Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter


class MixtureOfDepths(LearnedRouter):
    """The C tokens of a row with the highest scores r = x w pass the layer; its output is scaled by r (equation 1).

    C is `model.capacity_factor` of the row's tokens, so that `model.experts` is 1 and the factor at most 1. Choosing
    the highest of a row looks at later tokens. A sampler can't: by itself, a token passes where r > 0, for which the
    loss below trains the router (section 3.5, the first of two methods).

    predictor_loss: coefficient of the binary cross-entropy of sigmoid(r) for whether a token is among the C.
    """

    form = ExpertChoice
    k_experts = False
    skips_layers = True
    looks_ahead = "the layer chooses among all tokens of a row"
    in_generation = "a token passes where its score is above 0"

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, predictor_loss: NotNegative = 0.01):
        if model.experts != 1 or model.top_k != 1:
            raise UserError(
                f"model.experts is {model.experts} and model.top_k {model.top_k}; the router 'mixture_of_depths' has "
                "1 layer to send tokens to, and model.expert_width is its width"
            )
        if model.capacity_factor > 1:
            raise UserError(
                f"model.capacity_factor is {model.capacity_factor}; with the router 'mixture_of_depths' it is the "
                "share of the tokens that pass a layer, at most 1, 0.125 say"
            )
        if model.shared_experts or model.executor != "auto":
            raise UserError(
                f"model.shared_experts is {model.shared_experts} and model.executor {model.executor!r}; the router "
                "'mixture_of_depths' has no experts to execute: they must be 0 and 'auto'"
            )
        super().__init__(model, rngs)
        self.share, self.predictor_loss = model.capacity_factor, predictor_loss

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        score = jnp.where(valid, logits[..., 0], -math.inf)
        if replay is None:
            places = configs.compute_capacity(x.shape[1], 1, 1, self.share)
            token = jax.lax.top_k(score, places)[1]
            # In the order of the row; places that no valid token is left for come last.
            token = jnp.sort(jnp.where(jnp.take_along_axis(valid, token, axis=1), token, x.shape[1]), axis=1)
            replay = jnp.where(token < x.shape[1], token, -1)[:, None]
        token = replay[:, 0]
        weight = jnp.where(token >= 0, jnp.take_along_axis(logits[..., 0], jnp.maximum(token, 0), axis=1), 0)
        choice = ExpertChoice(replay, weight[:, None])
        mark = lambda row, index: row.at[jnp.where(index < 0, len(row), index)].set(1.0, mode="drop")
        among = jax.vmap(mark)(jnp.zeros(valid.shape), token)
        predicted = jnp.where(valid, optax.sigmoid_binary_cross_entropy(logits[..., 0], among), 0).sum()
        losses = {"predictor_loss": self.predictor_loss * predicted}
        return Routing(choice, losses, measure(logits, choice, valid, self.over))

    def route_alone(self, x, ids, valid, state):
        logits = self.logits(x)
        passes = valid & (logits[..., 0] > 0)
        # Each token is its own group's only one.
        choice = ExpertChoice(jnp.where(passes, 0, -1).reshape(-1, 1, 1), logits.reshape(-1, 1, 1))
        alone = lambda t: t.reshape(-1, 1, *t.shape[2:])
        return Routing(choice, {}, measure(alone(logits), choice, alone(valid), self.over))
