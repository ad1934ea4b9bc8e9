"""Quantile balancing: the bias at which each expert's load is fair, solved for instead of approached in small steps.

Su 2026 (kexue.fm/archives/11619, "MoE Odyssey 6"), in the form of the Kimi K3 technical report (Moonshot AI 2026,
section 2.3.3, equations 13 and 14, appendices C and D). Marin's grug mixtures are balanced by the same idea.
"""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.ranges import Positive, Range
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter, gather_chosen, largest_k, sum_to_1, token_choice


class Quantile(LearnedRouter):
    """Top-k routing by s + b, weighted by s: sigmoid scores s of the token, and a bias b of each expert. No losses.

    A token's cutoff a is the (k+1)-th largest of its s + b: what an expert has to exceed to be chosen. Were cutoffs to
    stay, the tokens that choose e would be those whose a - s_e is below its bias. So the next bias of e is the quantile
    k / E of a - s_e over all tokens of the batch, less the mean of these over the experts, which changes no choice.
    This is one round of an alternating solution of the balanced assignment's dual, begun where the last step ended.

    The bias is state: the choice depends on it and the token alone. The statistic `needed_bias` counts a - s_e for each
    expert in `bins` equal bins of [min b - 1, max b + 1], which it can't leave. Counts add up to the same bias however
    the batch is divided; within a bin the quantile is interpolated. The paper has 1,000 bins.

    normalize, scale: as in `DeepSeek`.
    """

    def __init__(
        self,
        model: configs.Model,
        rngs: nnx.Rngs,
        *,
        bins: Annotated[int, Range(least=2, most=2**16)] = 1000,
        normalize: bool = True,
        scale: Positive = 1.0,
    ):
        super().__init__(model, rngs)
        self.bins, self.normalize, self.scale = bins, sum_to_1(model, normalize), scale

    def init_state(self):
        return {"bias": jnp.zeros(self.experts)}

    def update(self, state, statistics):
        counts = statistics["needed_bias"]
        below = jnp.cumsum(counts, axis=-1)
        tokens = below[:, -1:]
        fair = tokens * (self.top_k / self.experts)
        bin = jnp.argmax(below >= fair, axis=-1, keepdims=True)
        inside = jnp.take_along_axis(counts, bin, axis=-1)
        share = 1 - (jnp.take_along_axis(below, bin, axis=-1) - fair) / jnp.maximum(inside, 1)
        low, width = self._grid(state["bias"])
        bias = low + width * (bin + share)[:, 0]
        return {"bias": jnp.where(tokens[:, 0] > 0, bias - bias.mean(), state["bias"])}

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        log_scores = jax.nn.log_sigmoid(logits)
        scores = jax.lax.stop_gradient(jnp.exp(log_scores))
        # With k = E there is no cutoff, every expert is chosen anyway.
        cutoffs, index = largest_k(scores + state["bias"], min(self.top_k + 1, self.experts))
        expert = index[..., : self.top_k] if replay is None else replay
        chosen = gather_chosen(log_scores, expert)
        weight = jax.nn.softmax(chosen) if self.normalize else jnp.exp(chosen)
        choice = token_choice(expert, self.scale * weight, valid)
        low, width = self._grid(state["bias"])
        bin = jnp.clip((cutoffs[..., -1:] - scores - low) / width, 0, self.bins - 1).astype(jnp.int32)
        one = valid[..., None].astype(jnp.float32)
        counts = jnp.zeros((self.experts, self.bins)).at[jnp.arange(self.experts), bin].add(one)
        return Routing(choice, {}, measure(logits, choice, valid, self.over) | {"needed_bias": counts})

    def _grid(self, bias: Float[Array, "E"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Where the bins begin, and how wide each is."""
        return bias.min() - 1, (bias.max() - bias.min() + 2) / self.bins
