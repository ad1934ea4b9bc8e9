"""BASE: an optimal balanced assignment of tokens to experts (Lewis et al. 2021, arXiv 2103.16716)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.routing.choice import Routing
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import LearnedRouter, choose_top, gather_chosen, token_choice

FAR = 2**30  # no way leads there
STEPS = 2**20  # whole numbers that the scores of a group are rounded to


class Base(LearnedRouter):
    """Top-1 routing in which every expert gets the same number of a group's tokens.

    While training, the experts a_t of a group's tokens maximize Σ_t h_t · w_{a_t}, where h_t is a token and w_e an
    expert's embedding, a column of the kernel, under the condition that all experts get equally many tokens (section
    3). In evaluation and generation a token goes to the expert of its highest score, and no token depends on another.
    The output is scaled by σ(h_t · w_{a_t}); gradients flow through it and not through the assignment.

    Where experts do not divide the tokens of a group that are not padding, some get one token more than others, those
    for which the sum is largest. The paper nears the optimum by an auction; here it is exact (`assign`), which is meant
    for groups of some hundreds of tokens and up to some tens of experts. The paper's shuffling of tokens over workers
    is left out: the group is what competes.
    """

    alone_in_evaluation = True
    looks_ahead = "the tokens of a group are assigned to experts together"
    in_generation = "each token goes to its best expert"

    def __init__(self, model: configs.Model, rngs: nnx.Rngs):
        if model.top_k != 1:
            raise UserError(f"model.top_k is {model.top_k}; the router 'base' sends each token to 1 expert")
        super().__init__(model, rngs)

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits = self.logits(x)
        if replay is None and key is not None:
            replay = jax.vmap(assign)(jax.lax.stop_gradient(logits), valid)[..., None]
        expert = choose_top(logits, 1, replay)
        choice = token_choice(expert, gather_chosen(jax.nn.sigmoid(logits), expert), valid)
        return Routing(choice, {}, measure(logits, choice, valid, self.over))


def assign(scores: Float[Array, "S E"], valid: Bool[Array, "S"]) -> Int[Array, "S"]:
    """The expert of each token, -1 where not valid, such that n valid tokens are spread evenly: n // E to each expert,
    and one more to n % E of them. Of all such assignments it has the largest sum of scores.

    By shortest augmenting paths (Jewell 1958; Ahuja, Magnanti and Orlin 1993, Network Flows, section 9.7). All tokens
    start at their best expert. As long as an expert has too many, tokens move along the cheapest chain of experts to
    one that has too few: one token from the first to the second, one from the second to the third, and so on. Each
    chain takes away one token that is too many, so there are fewer than n, whatever the scores are.

    How far scores are below the best of their token is rounded to whole numbers of D / STEPS, D the largest of these
    distances in the group. So sums are exact and no chain runs in a circle, and the sum of scores is within
    2 n D / STEPS of the largest (STEPS is less beyond 1,000 experts). An infinite score counts as the farthest finite
    one of the group or 0, and one that is not a number as -inf.
    """
    size, experts = scores.shape
    cost = _losses(scores, valid, min(STEPS, FAR // (experts + 2)))
    fair, more = valid.sum() // experts, valid.sum() % experts
    nodes = jnp.arange(experts)

    def surplus(expert, extra):
        # The places for one more are a node of their own, the last, to which each expert may give one token.
        load = (expert[:, None] == nodes).sum(axis=0)
        return jnp.append(load - extra - fair, extra.sum() - more)

    def moves(expert, origin):
        """What it costs to move a token of origin to each expert, the token for which that is cheapest."""
        rise = cost - cost[:, origin, None]
        return jnp.where((expert == origin)[:, None], rise, FAR).min(axis=0)

    def renewed(costs, expert, node):
        return jnp.where((nodes == node)[:, None], moves(expert, jnp.minimum(node, experts - 1)), costs)

    def augment(state):
        expert, extra, costs = state
        over = surplus(expert, extra)
        gives, takes = jnp.where(extra, FAR, 0), jnp.where(extra, 0, FAR)
        edges = jnp.block([[costs, gives[:, None]], [takes[None, :], jnp.full((1, 1), FAR)]])
        distance, before = _shortest(edges, over > 0)

        def move(state):
            expert, extra, costs, to = state
            origin = before[to]
            rise = cost[:, jnp.minimum(to, experts - 1)] - cost[:, jnp.minimum(origin, experts - 1)]
            cheapest = jnp.where(expert == origin, rise, FAR).argmin()
            moved = (jnp.arange(size) == cheapest) & (origin < experts) & (to < experts)
            expert = jnp.where(moved, to, expert)
            lent, returned = (nodes == origin) & (to == experts), (nodes == to) & (origin == experts)
            return expert, (extra | lent) & ~returned, renewed(costs, expert, to), origin

        end = jnp.where(over < 0, distance, FAR).argmin()
        expert, extra, costs, first = jax.lax.while_loop(lambda s: before[s[3]] >= 0, move, (expert, extra, costs, end))
        return expert, extra, renewed(costs, expert, first)

    expert = jnp.where(valid, cost.argmin(axis=1), -1)
    start = expert, jnp.zeros(experts, bool), jax.vmap(moves, (None, 0))(expert, nodes)
    return jax.lax.while_loop(lambda s: (surplus(s[0], s[1]) > 0).any(), augment, start)[0]


def _losses(scores: Float[Array, "S E"], valid: Bool[Array, "S"], levels: int) -> Int[Array, "S E"]:
    """How far each score is below the best of its token, as whole numbers up to levels."""
    scores = scores / 16  # differences are then finite, and so far below the largest float that 1 over them is normal
    finite = valid[:, None] & jnp.isfinite(scores)
    lowest, highest = scores.min(where=finite, initial=0), scores.max(where=finite, initial=0)
    scores = jnp.where(jnp.isnan(scores), lowest, scores).clip(lowest, highest)
    below = scores.max(axis=1, keepdims=True) - scores
    widest = below.max(where=valid[:, None], initial=1e-30)
    return jnp.round(below / widest * levels).astype(jnp.int32)


def _shortest(edges: Int[Array, "N N"], start: Bool[Array, "N"]) -> tuple[Int[Array, "N"], Int[Array, "N"]]:
    """The distance of each node from the nearest of the start, and the node before it, -1 for none (Bellman-Ford)."""

    def relax(state):
        distance, before, _ = state
        there = (distance[:, None] < FAR) & (edges < FAR)
        through = jnp.where(there, distance[:, None] + edges, FAR)
        shorter = through.min(axis=0) < distance
        before = jnp.where(shorter, through.argmin(axis=0), before)
        return jnp.minimum(distance, through.min(axis=0)), before, shorter.any()

    first = jnp.where(start, 0, FAR), jnp.full(start.shape, -1), jnp.array(True)
    return jax.lax.while_loop(lambda s: s[2], relax, first)[:2]
