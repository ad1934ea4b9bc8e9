"""A router with a state: each token goes to the expert of the best score, less how busy the expert has been."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice


class Momentum(LearnedRouter):
    """Top-k by s - b, weighted by s: softmax scores s, and a running mean b of each expert's share of the choices.

    decay: of the running mean, per step.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, decay: float = 0.9):
        super().__init__(model, rngs)
        self.decay = decay

    def init_state(self):
        return {"busy": jnp.zeros(self.experts)}

    def update(self, state, statistics):
        share = statistics["load"] / jnp.maximum(statistics["load"].sum(), 1)
        return {"busy": self.decay * state["busy"] + (1 - self.decay) * share}

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        scores = jax.nn.softmax(logits)
        expert = choose_top(scores - state["busy"], self.top_k, replay)
        choice = token_choice(expert, gather_chosen(scores, expert), valid)
        return Routing(choice, {}, measure(logits, choice, valid, self.over))
