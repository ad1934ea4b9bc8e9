"""GShard: the best expert always, the second best at random (Lepikhin et al. 2020, arXiv 2006.16668, algorithm 1)."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.ranges import NotNegative
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.losses import load_balancing_loss
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice


class GShard(LearnedRouter):
    """Top-2 routing with a random second expert.

    With g1 and g2 the two largest entries of softmax(x W), divided by their sum, a token goes to the first expert and,
    with probability 2 g2 while training and always otherwise, to the second. g1 is the same whether or not it does. The
    paper's local groups are the routing groups of `model.group_size`.

    balance_loss: coefficient of the loss on first choices. The paper's is Σ_e (c_e / S) m_e / E, with c_e the number of
        a group's first choices of e, places or not, and m_e the group's mean of the softmax's entry e. Here it is E²
        times that, as in `Switch`, so that it is the coefficient, whatever E, when both are even.
    """

    k_experts = False

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, balance_loss: NotNegative = 0.01):
        if model.top_k != 2:
            raise UserError(f"model.top_k is {model.top_k}; the router 'gshard' sends each token to 2 experts")
        super().__init__(model, rngs)
        self.balance_loss = balance_loss

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        pair = choose_top(logits, 2, None)
        if replay is not None:
            # A second expert that was not taken had a share in the weights: it was the best of the others.
            first, second = replay[..., :1], replay[..., 1:]
            best_other = jnp.where(pair[..., :1] == first, pair[..., 1:], pair[..., :1])
            pair = jnp.concatenate([first, jnp.where(second < 0, best_other, second)], axis=-1)
        weight = jax.nn.softmax(gather_chosen(logits, pair))
        expert = replay
        if replay is None:
            taken = True if key is None else 2 * weight[..., 1] > jax.random.uniform(key, valid.shape)
            expert = pair.at[..., 1].set(jnp.where(taken, pair[..., 1], -1))
        choice = token_choice(expert, weight, valid)
        loss = self.balance_loss * load_balancing_loss(jax.nn.softmax(logits), choice.expert[..., :1], valid, self.over)
        return Routing(choice, {"balance_loss": loss}, measure(logits, choice, valid, self.over))
