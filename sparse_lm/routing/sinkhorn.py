"""Sinkhorn: balanced assignment by Sinkhorn iterations, S-BASE (Clark et al. 2022, arXiv 2202.01169)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparse_lm import config as configs
from sparse_lm.ranges import Range
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice

LARGEST = 1e30  # of the scores in the iterations, where sums of them have to stay finite


class Sinkhorn(LearnedRouter):
    """Top-k of a transport plan between the tokens of a group and the experts.

    With scores L = x W, the plan is the P that maximizes <P, L> + H(P), H the entropy, among those with rows that sum
    to 1 and columns that sum to an equal share of the group's tokens. It is exp(L) times a factor for each token and
    one for each expert, which Sinkhorn iterations find: rows and columns are normalized in turn. While training, a
    token goes to the k experts of the largest entries of its row, so that experts get nearly equal numbers of tokens.
    In evaluation and generation it goes to those of its k largest scores, and no token depends on another.

    The output is scaled by the sigmoid of the score, as in BASE layers, which S-BASE descends from; gradients flow
    through it and not through the plan. Where the paper leaves room it is as in Megatron-LM, but for this: Megatron-LM
    iterates until the factors settle, here a fixed number of times, and its weight for k > 1 is a softmax.

    iterations: normalizations of the rows, and as many of the columns; the last is of the columns.
    """

    alone_in_evaluation = True
    looks_ahead = "the tokens of a group are assigned to experts together"
    in_generation = "each token goes to its top_k best experts"

    def __init__(
        self, model: configs.Model, rngs: nnx.Rngs, *, iterations: Annotated[int, Range(least=1, most=1000)] = 8
    ):
        super().__init__(model, rngs)
        self.iterations = iterations

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        rows = logits if key is None else balanced(jax.lax.stop_gradient(logits), valid, self.iterations)
        expert = choose_top(rows, self.top_k, replay)
        choice = token_choice(expert, gather_chosen(jax.nn.sigmoid(logits), expert), valid)
        return Routing(choice, {}, measure(logits, choice, valid, self.over))


def balanced(logits: Float[Array, "G S E"], valid: Bool[Array, "G S"], iterations: int) -> Float[Array, "G S E"]:
    """The logarithm of the plan, but for a constant in each row: the logits plus a number for each expert.

    An infinite score counts as ±1e30, one that is not a number as -1e30.
    """
    logits = jnp.nan_to_num(logits, nan=-LARGEST).clip(-LARGEST, LARGEST)

    def iterate(_, expert):
        token = -jax.nn.logsumexp(logits + expert, axis=2, keepdims=True)
        share = jax.nn.logsumexp(jnp.where(valid[..., None], logits + token, -jnp.inf), axis=1, keepdims=True)
        return -share

    return logits + jax.lax.fori_loop(0, iterations, iterate, jnp.zeros_like(logits[:, :1]))
