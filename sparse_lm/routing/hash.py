"""Hash: a fixed table says which experts a token id goes to (Roller et al. 2021, arXiv 2106.04426)."""

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import Router, check_several, gather_chosen, kernel, scores, token_choice

COUNTED = 8  # tokens per entry of the vocabulary that are counted before the balanced table is dealt


class Hash(Router):
    """Routing by token id alone: K distinct experts for each id, drawn at random once and for all.

    Weights are 1/K. (For K > 1 the paper's MultiHash cuts one expert's hidden units into K parts and picks each part by
    a table of its own; here K whole experts are picked and averaged.) Every layer has the same table.

    balanced: the paper's balanced assignment: the most frequent id first, each to the experts of least load so far. The
        paper counts its training data beforehand. Here the first steps are routed at random and counted, and when there
        are 8 tokens for each entry of the vocabulary, the table is dealt from the counts, and fixed from then on. One
        token more is assumed of each id, so that unseen ones spread too. An id that is more frequent than an expert's
        fair share can't be balanced.
    gate: the weights come from a learned gate, as in the first three layers of DeepSeek-V4 (DeepSeek-AI 2026, section
        2.1): sqrt(softplus(x W)) of the K experts over their sum. Their constant factor on the weights is left out.

    Raises `UserError` for a gate over one expert per token.
    """

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, balanced: bool = False, gate: bool = False):
        if gate:
            check_several(model)
        super().__init__(model, rngs)
        self.vocabulary, self.balanced = model.vocabulary, balanced
        self.kernel = kernel(model, rngs) if gate else None

    def init_state(self):
        drawn = jax.random.uniform(jax.random.key(0), (self.vocabulary, self.experts))
        table = {"table": jax.lax.top_k(drawn, self.top_k)[1]}
        return table | ({"seen": jnp.zeros(self.vocabulary)} if self.balanced else {})

    def update(self, state, statistics):
        if not self.balanced:
            return state
        enough = COUNTED * self.vocabulary
        counting = state["seen"].sum() < enough
        seen = state["seen"] + jnp.where(counting, statistics["seen"], 0)
        due = counting & (seen.sum() >= enough)

        def deal(_, table):
            order = jnp.argsort(-seen)

            def one(i, dealt):
                load, table = dealt
                expert = jax.lax.top_k(-load, self.top_k)[1]
                return load.at[expert].add(seen[order[i]] + 1), table.at[order[i]].set(expert)

            return jax.lax.fori_loop(0, self.vocabulary, one, (jnp.zeros(self.experts), table))[1]

        # A loop of one turn when it is due, and of none in every other step; a `cond` mapped over layers computes both.
        table = jax.lax.fori_loop(0, due.astype(jnp.int32), deal, state["table"])
        return {"table": table, "seen": seen}

    def route(self, x, ids, valid, state, key=None, replay=None):
        expert = jnp.take(state["table"], ids, axis=0) if replay is None else replay
        if self.kernel is None:
            logits = jnp.zeros((*valid.shape, self.experts))
            weight = jnp.full(expert.shape, 1 / self.top_k)
        else:
            logits = scores(x, self.kernel)
            score = jnp.sqrt(jax.nn.softplus(gather_chosen(logits, expert)) + 1e-12)  # slope of the root
            weight = score / score.sum(axis=-1, keepdims=True)
        choice = token_choice(expert, weight, valid)
        statistics = measure(logits, choice, valid, self.over)
        if self.balanced:
            seen = jnp.zeros(self.vocabulary).at[ids].add(valid.astype(jnp.float32))
            statistics |= {"seen": seen}
        return Routing(choice, {}, statistics)
