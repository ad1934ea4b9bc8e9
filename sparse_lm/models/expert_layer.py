"""A mixture of experts in a feed-forward layer's place: router, placement and experts."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.experts import EXECUTORS, Experts
from sparse_lm.experts.auto import executor_name
from sparse_lm.mesh import constrain
from sparse_lm.models.context import Aux, Context
from sparse_lm.models.counting import Count, Part, Setting, elementwise, product
from sparse_lm.models.feed_forward import HIDDEN, FeedForward
from sparse_lm.registry import create, lookup
from sparse_lm.routing import (
    ROUTERS,
    Replay,
    Router,
    SoftSlots,
    TokenChoice,
    chosen_indices,
    indices_to_replay,
    router_of,
)

# (forward, backward) FLOPs per element, see `models.counting`.
ROUTER_WIDTH = (60, 13)  # jitter, which is mostly making random numbers
ROUTER_EXPERT = (42, 16)  # per expert: softmax, placement, losses, health


class ExpertLayer(nnx.Module):
    """Router, placement and experts in place of a feed-forward layer: x [B, L, D] to [B, L, D].

    Tokens are routed in groups of S consecutive ones in the order of the rows. A token without a place has output 0, so
    that the residual branch passes it on unchanged. Shared experts (Dai et al. 2024, arXiv 2401.06066, section 3.2) are
    one dense layer of their joint width, added for every token.
    """

    def __init__(self, model: configs.Model, hidden: int, rngs: nnx.Rngs):
        self.experts = FeedForward(model, hidden, rngs, experts=model.experts)
        self.router = create("model.router", ROUTERS, model.router, model, rngs)
        _check_executor(model, self.router)
        shared = model.shared_experts * hidden
        self.shared = FeedForward(model, shared, rngs) if shared else None
        self.model = model

    def __call__(
        self,
        x: Float[Array, "B L D"],
        context: Context,
        state: Any,
        key: jax.Array | None = None,
        replay: jax.Array | Replay | None = None,
    ) -> tuple[Float[Array, "B L D"], Aux]:
        model = self.model
        route_key, drop_key = (None, None) if key is None else jax.random.split(key)
        size = min(model.group_size, x.shape[0] * x.shape[1])
        group = lambda t: constrain(t.reshape(-1, size, *t.shape[2:]), "groups", *[None] * (t.ndim - 1))
        inputs = (group(x), group(context.ids), group(context.valid), state)
        with jax.named_scope("router"):
            if context.alone:
                routing = self.router.route_alone(*inputs)
            else:
                indices = indices_to_replay(replay, lambda: self.router.route(*inputs, route_key))
                routing = self.router.route(*inputs, route_key, indices)
        experts = Experts(
            *self.experts.weights(x.dtype),
            activation=model.activation,
            dropout_rate=model.expert_dropout,
            key=drop_key,
            # Outside training nothing may overflow: what is dropped depends on later tokens and on other rows.
            buffer=math.inf if key is None else model.exchange_buffer,
            passed=model.top_k if isinstance(routing.choice, TokenChoice) else model.experts,
        )
        capacity = configs.compute_capacity(size, model.experts, model.top_k, context.capacity_factor)
        y, dropped = EXECUTORS[model.executor].run(inputs[0], routing.choice, experts, capacity)
        y = constrain(y.reshape(x.shape), "batch", None, None)
        if self.shared is not None:
            y += self.shared(x)[0]
        return y, Aux(routing.losses, routing.statistics | {"dropped": dropped}, chosen_indices(routing.choice))

    def flops(self, setting: Setting) -> Iterator[Part]:
        """Per token: of the mathematics, the experts that it passes; run are all rows that the executor computes."""
        model, passed = self.model, experts_per_token(self.model)
        executor = executor_name(model, self.router.form, setting.platform)
        rows = executed_rows(model, executor) / model.group_size
        yield product("router", router_flops(self.router), again=setting.products_again)
        products = passed * self.experts.product_flops
        yield product("experts", products, executed=rows / passed, again=setting.rest_again)
        counts = [(rows * self.experts.hidden, HIDDEN[model.activation])]
        counts += [(model.width, ROUTER_WIDTH), (model.experts, ROUTER_EXPERT)]
        yield from elementwise(counts, setting)
        if self.shared is not None:
            yield from self.shared.flops(setting._replace(last=False), "shared experts")
        move = lookup("model.executor", MOVING, executor)
        yield from move(model, self.router, model.group_size * rows, setting)


def _check_executor(model: configs.Model, router: Router) -> None:
    forms = lookup("model.executor", EXECUTORS, model.executor).forms
    if router.form not in forms:
        able = ", ".join(name for name, executor in EXECUTORS.items() if router.form in executor.forms)
        raise UserError(
            f"model.executor is {model.executor!r}, which can't express the {router.form.__name__} of the router "
            f"{model.router.name!r}; these can: {able}"
        )


def places_per_expert(model: configs.Model) -> int:
    """C, in training."""
    return configs.compute_capacity(model.group_size, model.experts, model.top_k, model.capacity_factor)


def experts_per_token(model: configs.Model) -> Count:
    """How many experts' work the mathematics needs for a token: K where tokens choose, otherwise E C / S."""
    if router_of(model).form is TokenChoice:
        return model.top_k
    return model.experts * places_per_expert(model) / model.group_size


def executed_rows(model: configs.Model, executor: str) -> int:
    """Rows that the experts compute for a group: every place, or where rows are sorted every choice."""
    if executor == "grouped":
        return model.top_k * model.group_size
    return model.experts * places_per_expert(model)


def router_flops(router: Router) -> int:
    """Of a token; a router's matrices are multiplied with the features of every token."""
    kernels = [leaf for leaf in jax.tree.leaves(nnx.state(router, nnx.Param)) if len(leaf.shape) > 1]
    return sum(2 * math.prod(leaf.shape) for leaf in kernels)


def _mask_flops(model: configs.Model, router: Router, places: Count, setting: Setting) -> Iterator[Part]:
    """Dispatch has one gradient, the 0s and 1s of its mask having none; combine has two."""
    contract, masks = 2 * places * model.width, 2 * model.top_k * places
    again = setting.rest_again  # combine is the last product of a period
    if router.form is SoftSlots:  # mixtures are the mathematics itself, and both have a gradient
        yield product("dispatch", contract, again=again)
        yield product("combine", contract)
        return
    yield Part("dispatch", 0.0, contract + masks, contract, again * (contract + 2 * masks))
    yield Part("combine", 0.0, contract + masks, 2 * contract + masks)


def _index_flops(model: configs.Model, router: Router, places: Count, setting: Setting) -> Iterator[Part]:
    """Rows are moved at no FLOPs; the outputs of a token's experts are weighted and added."""
    weighted = 2 * experts_per_token(model) * model.width
    yield Part("combine", 0.0, weighted, 2 * weighted)


# What moving tokens to experts and back costs, by executor.
MOVING: dict[str, Callable] = {"einsum": _mask_flops, "gather": _index_flops, "grouped": _index_flops}
