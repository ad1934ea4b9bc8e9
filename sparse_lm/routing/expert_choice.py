"""Expert choice: each expert takes the tokens that suit it best (Zhou et al. 2022, arXiv 2202.09368)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.choice import ExpertChoice, Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice


class ExpertChoiceRouter(LearnedRouter):
    """Each expert takes the C tokens of a group with the largest scores for it, weighted by the score.

    Scores are softmax(x W) over the experts (equation 1); C is `model.capacity_factor` times the even share
    top_k S / E, so that a token gets capacity_factor · top_k experts on average (the paper's c) but may get none, or
    all. Loads are even without a loss. The bound on experts per token (section 3.3) is left out.

    Whether a token is taken depends on the later tokens of its group. Generation can't know them: there each token goes
    to the top_k experts of its largest scores, weighted by the scores.

    Raises `UserError` for a capacity_factor of inf, with which every expert would take every token.
    """

    form = ExpertChoice
    k_experts = False
    looks_ahead = "experts choose among all tokens of a group"
    in_generation = "each token goes to its top_k best experts"

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        if math.isinf(model.capacity_factor):
            raise UserError("model.capacity_factor is inf; the router 'expert_choice' needs a finite one, such as 1.0")
        super().__init__(model, rngs)
        self.capacity_factor = model.capacity_factor

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        by_expert = jax.nn.softmax(logits).swapaxes(1, 2)
        if replay is None:
            places = configs.compute_capacity(valid.shape[1], self.experts, self.top_k, self.capacity_factor)
            replay = jax.lax.top_k(jnp.where(valid[:, None], by_expert, -1), places)[1]
        token = jnp.maximum(replay, 0)
        there = (replay >= 0) & jnp.take_along_axis(valid[:, None], token, axis=2)
        weight = jnp.take_along_axis(by_expert, token, axis=2)
        choice = ExpertChoice(jnp.where(there, replay, -1), jnp.where(there, weight, 0))
        return Routing(choice, {}, measure(logits, choice, valid, self.over))

    def route_alone(self, x, ids, valid, state):
        logits = self.logits(x)
        expert = choose_top(logits, self.top_k, None)
        choice = token_choice(expert, gather_chosen(jax.nn.softmax(logits), expert), valid)
        return Routing(choice, {}, measure(logits, choice, valid, self.over))
