"""Switch: each token goes to its most probable expert (Fedus, Zoph and Shazeer 2021, arXiv 2101.03961, section 2)."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.choice import Routing, TokenChoice
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import Router


class Switch(Router):
    """Top-1 routing.

    With router probabilities p = softmax(x W), a token goes to argmax p and its output is scaled by that probability
    (equation 2). The text is followed where the paper's pseudocode differs: jitter multiplies the router's input (the
    pseudocode adds it to the logits), and an expert takes as many tokens as its capacity (the pseudocode, one fewer).

    jitter: the input is multiplied by noise uniform in [1 - jitter, 1 + jitter] while training.
    balance_loss: α of equations 4 to 6, the loss α E Σ_e f_e P_e with f_e the share of a group's tokens that chose e
        and P_e the group's mean probability of e. It is α when both are even.
    z_loss: coefficient of the mean squared logsumexp of the logits (Zoph et al. 2022, arXiv 2202.08906, equation 5).
    """

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        jitter: float = 0.01,
        balance_loss: float = 0.01,
        z_loss: float = 0.001,
    ):
        if model.top_k != 1:
            raise UserError(f"model.top_k is {model.top_k}; the router 'switch' sends each token to 1 expert")
        super().__init__(model, rngs)
        self.jitter, self.balance_loss, self.z_loss = jitter, balance_loss, z_loss

    def route(self, x, ids, valid, state, key=None, given=None):
        if key is not None and self.jitter:
            x = x.astype(jnp.float32)
            x *= jax.random.uniform(key, x.shape, minval=1 - self.jitter, maxval=1 + self.jitter)
        logits = self.logits(x)
        probabilities = jax.nn.softmax(logits)
        expert = jnp.argmax(logits, axis=-1)[..., None] if given is None else given
        weight = jnp.take_along_axis(probabilities, jnp.maximum(expert, 0), axis=-1)
        choice = TokenChoice(jnp.where(valid[..., None], expert, -1), jnp.where(valid[..., None], weight, 0))

        experts = logits.shape[-1]
        tokens = valid.sum(axis=-1)
        chosen = jax.nn.one_hot(choice.expert[..., 0], experts).sum(axis=1)
        probability = jnp.where(valid[..., None], probabilities, 0).sum(axis=1)
        # tokens · E Σ f P, where f and P are means over the group's tokens; a group of padding alone is 0
        balance = experts * (chosen * probability).sum(axis=-1) / jnp.maximum(tokens, 1)
        z = jnp.where(valid, jax.nn.logsumexp(logits, axis=-1), 0) ** 2
        losses = {"balance_loss": self.balance_loss * balance.sum(), "z_loss": self.z_loss * z.sum()}
        return Routing(choice, losses, measure(logits, choice))
