"""Top-k: each token goes to its k most probable experts, as most large mixtures do.

Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1) takes the softmax over the chosen logits; OLMoE (Muennighoff
et al. 2024, arXiv 2409.02060, section 2) the chosen entries of the softmax over all. ST-MoE (Zoph et al. 2022, arXiv
2202.08906) adds the router z-loss; batch-prioritised dropping is from V-MoE (Riquelme et al. 2021, arXiv 2106.05974,
section 4).
"""

import jax
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.ranges import NotNegative, Share
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.losses import load_balancing_loss, router_z_loss
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, jittered, sum_to_1, token_choice


class TopK(LearnedRouter):
    """Top-k routing.

    normalize: weights are the softmax over the k chosen logits, so that they sum to 1 (Mixtral, ST-MoE); without it,
        and always for one expert per token, which a weight of 1 would teach nothing, the chosen entries of the softmax
        over all experts (OLMoE, V-MoE, Switch).
    priority: under a capacity, tokens whose largest probability is higher take their places first (V-MoE's batch
        prioritised routing). What is dropped then depends on later tokens.
    jitter, balance_loss, z_loss: as in `Switch`.
    """

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        normalize: bool = True,
        priority: bool = False,
        jitter: Share = 0.0,
        balance_loss: NotNegative = 0.01,
        z_loss: NotNegative = 0.001,
    ):
        super().__init__(model, rngs)
        self.normalize, self.priority, self.jitter = sum_to_1(model, normalize), priority, jitter
        self.balance_loss, self.z_loss = balance_loss, z_loss

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(jittered(x, self.jitter, key))
        probabilities = jax.nn.softmax(logits)
        expert = choose_top(logits, self.top_k, replay)
        weight = (
            jax.nn.softmax(gather_chosen(logits, expert)) if self.normalize else gather_chosen(probabilities, expert)
        )
        priority = jax.lax.stop_gradient(probabilities.max(axis=-1)) if self.priority else None
        choice = token_choice(expert, weight, valid, priority)
        losses = {
            "balance_loss": self.balance_loss * load_balancing_loss(probabilities, choice.expert, valid, self.over),
            "z_loss": self.z_loss * router_z_loss(logits, valid),
        }
        return Routing(choice, losses, measure(logits, choice, valid, self.over))
