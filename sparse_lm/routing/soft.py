"""Soft: experts work on mixtures of tokens (Puigcerver et al. 2023, arXiv 2308.00951)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.parameter import init_matrix, init_ones
from sparse_lm.routing.choice import Routing, SoftSlots, TokenChoice
from sparse_lm.routing.health import measure
from sparse_lm.routing.router import Router


class Soft(Router):
    """Soft mixture: no token is sent anywhere, each of an expert's C slots takes a mixture of the group's tokens.

    With a vector for each slot in Φ, slot logits are L = X Φ. A slot's input is the mean of the group's tokens with
    weights D, the softmax of L over the tokens; a token's output is the mean of the slots' outputs with weights C, the
    softmax of L over all slots of all experts (section 2.1). Padding is in no mixture and has an output of 0.

    An expert has as many slots as `config.capacity` gives it places in a group at the training capacity factor; a
    factor of 1 with top_k = 1 makes as many slots as tokens. They are part of Φ, and stay when groups are smaller.

    Generation sees one token at a time, and a mixture of one token is that token: every slot of an expert has the token
    itself as its input, so that `route_alone` sends each token to all experts, with the sum of its weights of their
    slots. That is not what was trained, whose slots mix tokens.

    normalize: x and the vectors of Φ are divided by their lengths, and the logits multiplied with a trained scale that
        begins at 1 (section 2.3), which keeps the softmax from collapsing at large widths.
    """

    form = SoftSlots
    k_experts = False
    looks_ahead = "slots mix all tokens of a group"
    in_generation = "each token passes all experts"

    def __init__(self, model: configs.Model, rngs: nnx.Rngs, *, normalize: bool = True):
        if math.isinf(model.capacity_factor):
            raise UserError("model.capacity_factor is inf; the router 'soft' makes slots by it: it must be finite")
        super().__init__(model, rngs)
        slots = configs.compute_capacity(model.group_size, model.experts, model.top_k, model.capacity_factor)
        axes = ("width", "router_experts", "slots")
        shape = (model.width, model.experts, slots)
        self.phi = init_matrix(rngs, shape, axes, fan_in=model.width, scale=model.init_scale)
        self.scale = init_ones((1,), ("norm",)) if normalize else None

    def logits(self, x: Float[Array, "G S D"], valid: Bool[Array, "G S"]) -> Float[Array, "G S E C"]:
        """Of each token for each slot, in float32 as `scores` are; 0 for padding."""
        x, phi = jnp.where(valid[..., None], x, 0).astype(jnp.float32), self.phi[...]
        if self.scale is not None:
            x, phi = _unit(x, axis=-1), self.scale[...] * _unit(phi, axis=0)
        return jnp.einsum("gsd,dec->gsec", x, phi, precision=jax.lax.Precision.HIGHEST)

    def route(self, x, ids, valid, state, key=None, replay=None):
        logits, real = self.logits(x, valid), valid[..., None, None]
        # The least finite number, not -inf, so that a group of padding alone has a softmax.
        dispatch = jax.nn.softmax(jnp.where(real, logits, jnp.finfo(logits.dtype).min), axis=1)
        combine = jax.nn.softmax(logits, axis=(2, 3))
        choice = SoftSlots(jnp.where(real, dispatch, 0), jnp.where(real, combine, 0))
        return Routing(choice, {}, measure(_of_experts(logits), choice, valid, self.over))

    def route_alone(self, x, ids, valid, state):
        logits = self.logits(x, valid)
        weight = jnp.where(valid[..., None], jax.nn.softmax(logits, axis=(2, 3)).sum(axis=3), 0)
        every = jnp.broadcast_to(jnp.arange(self.experts), weight.shape)
        choice = TokenChoice(jnp.where(valid[..., None], every, -1), weight)
        return Routing(choice, {}, measure(_of_experts(logits), choice, valid, self.over))


def _of_experts(logits: Float[Array, "G S E C"]) -> Float[Array, "G S E"]:
    """One logit for each expert, whose softmax is the share that its slots have in a token."""
    return jax.nn.logsumexp(logits, axis=3) - math.log(logits.shape[3])


def _unit(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """x over its length, and 0 where that is 0."""
    return x * jax.lax.rsqrt((x**2).sum(axis=axis, keepdims=True) + 1e-12)
