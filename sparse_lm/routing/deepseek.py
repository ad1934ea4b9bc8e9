"""DeepSeek-V3's router: sigmoid scores, balance by a bias on the choice, experts of a limited number of groups.

DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), with the balance of Wang et al. 2024 (arXiv
2408.15664). DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066) scores by softmax, DeepSeek-V4 (2026) by the root of
softplus. Shared experts are `model.shared_experts`, fine-grained ones a small `model.expert_width`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.errors import UserError, suggest
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.losses import load_balancing_loss
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, sum_to_1, token_choice

LOG_SCORES = {
    "sigmoid": jax.nn.log_sigmoid,
    # Below -80 softplus is too small for float32, and the gradient of its logarithm 0 / 0.
    "sqrt_softplus": lambda logits: jnp.log(jax.nn.softplus(jnp.maximum(logits, -80.0))) / 2,
    "softmax": jax.nn.log_softmax,
}


class DeepSeek(LearnedRouter):
    """Top-k routing by s + b, weighted by s: scores s of the token (equation 15), and a bias b of each expert.

    The bias is state. After each step it grows by `bias_rate` where an expert's load in the whole batch was below the
    mean, and shrinks by as much where it was above (equation 16 and the text after it). It has no gradient and no part
    in the weights.

    score: sigmoid (V3), sqrt_softplus (V4) or softmax (DeepSeekMoE, V2) of the logits.
    normalize: weights are the scores of the chosen experts over their sum (equation 13); without it, and always for one
        expert per token, the scores.
    scale: what weights are multiplied with, the routed scaling factor of the published models (V3: 2.5).
    groups, groups_kept: node-limited routing. The experts stand in `groups` equal groups, and a token chooses among
        those of the `groups_kept` groups whose two best s + b have the largest sums, as in DeepSeek's code; the paper
        sums the best top_k / groups_kept, which are two in its model.
    bias_rate: γ, the bias update speed. 0 keeps the bias as it is.
    sequence_loss: α of the balance loss of equations 17 to 20. Its sequence is the routing group whatever
        `model.balance_over` says, since it is there against extremes within one. As equation 18 has it, f counts the k
        experts of the largest s, without bias or groups.
    """

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        score: str = "sigmoid",
        normalize: bool = True,
        scale: float = 1.0,
        groups: int = 1,
        groups_kept: int = 1,
        bias_rate: float = 0.001,
        sequence_loss: float = 0.0001,
    ):
        if score not in LOG_SCORES:
            raise UserError(f"model.router.options.score is {score!r}{suggest(score, LOG_SCORES)}")
        _check_groups(model, groups, groups_kept)
        super().__init__(model, rngs)
        self.log_scores, self.normalize, self.scale = LOG_SCORES[score], sum_to_1(model, normalize), scale
        self.groups, self.groups_kept = groups, groups_kept
        self.bias_rate, self.sequence_loss = bias_rate, sequence_loss

    def init_state(self):
        return {"bias": jnp.zeros(self.experts)}

    def update(self, state, statistics):
        load = statistics["load"]
        return {"bias": state["bias"] + self.bias_rate * jnp.sign(load.mean() - load)}

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        log_scores = self.log_scores(logits)
        scores = jnp.exp(log_scores)
        expert = choose_top(self._in_best_groups(scores + state["bias"]), self.top_k, replay)
        # The softmax of logarithms is each over the sum, also where all are too small to be divided.
        weight = jax.nn.softmax(gather_chosen(log_scores, expert)) if self.normalize else gather_chosen(scores, expert)
        choice = token_choice(expert, self.scale * weight, valid)
        losses = {}
        if self.sequence_loss:
            best = jnp.where(valid[..., None], choose_top(scores, self.top_k, None), -1)
            share = jax.nn.softmax(log_scores)
            losses["sequence_loss"] = self.sequence_loss * load_balancing_loss(share, best, valid, "group")
        return Routing(choice, losses, measure(logits, choice, valid, self.over))

    def _in_best_groups(self, biased: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """The scores, but -inf for the experts of groups that are not kept."""
        if self.groups == 1:
            return biased
        grouped = biased.reshape(*biased.shape[:2], self.groups, -1)
        of_group = jax.lax.top_k(grouped, 2)[0].sum(axis=-1)
        best = jax.lax.top_k(of_group, self.groups_kept)[1]
        kept = jax.nn.one_hot(best, self.groups).any(axis=-2)
        return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(biased.shape)


def _check_groups(model: configs.Model, groups: int, kept: int) -> None:
    what, experts = f"model.router.options.groups is {groups}", model.experts
    if groups < 1 or experts % groups:
        raise UserError(f"{what}, which does not divide model.experts={experts} into equal groups")
    if groups > 1 and experts // groups < 2:
        raise UserError(f"{what} of {experts // groups} expert each; a group is judged by its two best experts")
    if not 1 <= kept <= groups:
        raise UserError(f"model.router.options.groups_kept is {kept}; it must be 1 to groups={groups}")
    if model.top_k > (most := kept * (experts // groups)):
        raise UserError(f"model.top_k is {model.top_k}, above the {most} experts of groups_kept={kept} groups")
