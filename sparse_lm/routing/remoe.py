"""ReMoE: each expert decides by itself, by the ReLU of its score (Wang et al. 2024, arXiv 2412.14711)."""

import math
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.ranges import Range
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.losses import by_region
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice


class ReMoE(LearnedRouter):
    """ReLU routing with adaptive sparsity.

    A token goes to every expert whose gate relu(x W) is above 0, with the gate as its weight (section 3.1). How many
    these are differs by token; an L1 loss on the gates brings their mean to k. Its coefficient λ is state: after a step
    it is multiplied by `multiplier` if the mean was above k, and divided by it if it was below (section 3.2).
    The loss is λ Σ_e f_e R_e for a token with gates R, where f_e = E / k times the share of the tokens of a region of
    `model.balance_over` that go to e, so that crowded experts are pressed more (section 3.3).

    The paper has one λ, steered by the mean over all layers. Here each layer has its own, so that each has a mean of k.
    λ stays between `coefficient`, too small to have an effect, and 1 / `coefficient`, so that it always finds back.
    About half of the gates are positive at first (stage I of the paper, some hundred steps): under a capacity, most of
    these choices are dropped.

    coefficient: λ of the first step. multiplier: α.
    bound: the largest number of experts of a token, over k; of more positive gates the largest stay. Executors make
        room for that many choices of each token, for all E without a bound. Statistics besides those of all routers:
        `active`, the positive gates, and `beyond_bound`, those of them that were left out.
    """

    k_experts = False

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        coefficient: Annotated[float, Range(above=0, below=1)] = 1e-8,
        multiplier: Annotated[float, Range(above=1, below=math.inf)] = 1.2,
        bound: Annotated[float, Range(least=1)] = math.inf,
    ):
        super().__init__(model, rngs)
        self.coefficient, self.multiplier = coefficient, multiplier
        self.most = math.ceil(min(model.experts, bound * model.top_k))

    def init_state(self):
        return {"coefficient": jnp.float32(self.coefficient)}

    def update(self, state, statistics):
        excess = jnp.sign(statistics["active"] - self.top_k * statistics["tokens"])
        after = state["coefficient"] * self.multiplier**excess
        return {"coefficient": jnp.clip(after, self.coefficient, 1 / self.coefficient)}

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        gates = jnp.where(valid[..., None], jax.nn.relu(logits), 0)
        active = gates > 0
        expert = choose_top(gates, self.most, replay)
        weight = gather_chosen(gates, expert)
        if replay is None:
            expert = jnp.where(weight > 0, expert, -1)
        choice = token_choice(expert, weight, valid)
        of_token = active.sum(axis=-1)
        statistics = measure(logits, choice, valid, self.over) | {
            "active": of_token.sum().astype(jnp.float32),
            "beyond_bound": jnp.maximum(of_token - self.most, 0).sum().astype(jnp.float32),
        }
        tokens = by_region(valid.sum(axis=1), self.over)[:, None]
        named = by_region(active.sum(axis=1), self.over)
        pressed = self.experts * named / (self.top_k * jnp.maximum(tokens, 1)) * by_region(gates.sum(axis=1), self.over)
        return Routing(choice, {"l1_loss": state["coefficient"] * pressed.sum()}, statistics)
