"""Floating-point operations per token: what the mathematics needs, and what the program runs.

A multiply-add counts 2. *Model* FLOPs are those of the mathematics: K experts per token, each query against the L/2
keys before it on average, 3 times the forward pass in training (a matrix product has two gradients of its own size).
Work per element (norms, softmax, activations, the optimizer) is left out, as is usual, and looking up an embedding
costs nothing. *Executed* FLOPs are those of the compiled program: each query against all L keys, every place of an
expert whether a token holds it or not, the one-hot masks of the einsum executor, what rematerialisation computes again,
and the work per element (`sparse_lm.cost.elementwise`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_lm.config import Config, Model
from sparse_lm.cost.arrays import of_blocks
from sparse_lm.cost.elementwise import layer_elements, optimizer_flops, outer_elements
from sparse_lm.cost.routers import experts_per_token, form, router_arrays, rows, settled, skips_layers
from sparse_lm.registry import lookup


@dataclass(frozen=True)
class Part:
    """FLOPs per token of one part of one layer (None: outside the layers)."""

    layer: int | None
    name: str
    model: float  # forward
    forward: float  # executed
    backward: float  # executed, without what is computed again
    again: float = 0.0  # of the forward pass, in the backward pass

    @property
    def model_training(self) -> float:
        return 3 * self.model

    @property
    def training(self) -> float:
        """Executed."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part, and their sums. The router's are part of all sums, and given apart as well."""

    parts: tuple[Part, ...]

    @property
    def forward(self) -> float:
        return sum(part.model for part in self.parts)

    @property
    def training(self) -> float:
        return sum(part.model_training for part in self.parts)

    @property
    def router(self) -> float:
        """Model FLOPs of the routers in training: what a sparse model needs beyond its dense twin."""
        return sum(part.model_training for part in self.parts if part.name == "router")

    @property
    def executed_forward(self) -> float:
        """Of a training step, at the training capacity."""
        return sum(part.forward for part in self.parts)

    @property
    def executed_training(self) -> float:
        """Forward and backward, without the optimizer, whose work is per step (`step_flops`)."""
        return sum(part.training for part in self.parts)


def flops(model: Model, length: int, platform: str = "cpu") -> Flops:
    """FLOPs per token of a resolved model on rows of `length` tokens.

    platform: cpu, gpu or tpu, where `auto` has its executor; it makes a difference to executed FLOPs alone.

    Raises `UserError` for an unknown executor.
    """
    return Flops(tuple(_parts(settled(model, platform), length)))


def step_flops(config: Config, platform: str) -> float:
    """Executed FLOPs of one training step of a resolved config over all devices of a platform, the optimizer's
    included."""
    tokens = config.training.batch * config.data.length
    return tokens * flops(config.model, config.data.length, platform).executed_training + optimizer_flops(config)


def _parts(model: Model, length: int) -> Iterator[Part]:
    D, H, Hkv, h = model.width, model.heads, model.kv_heads, model.head_width
    full, dots = model.remat == "full", model.remat in ("full", "dots")  # what is computed again
    for layer in range(model.layers):
        # Of the tokens, and of the keys that each sees.
        share = experts_per_token(model) if skips_layers(model) and model.is_expert_layer(layer) else 1
        yield _product(layer, "attention projections", share * 2 * (2 * D * H * h + 2 * D * Hkv * h), again=full)
        yield _product(layer, "attention scores", share**2 * 2 * H * h * length, executed=2, again=dots)
        yield from _feed_forward(model, layer)
        forward, backward = (share * elements for elements in layer_elements(model, layer, length))
        yield Part(layer, "elementwise", 0.0, forward, backward, forward * dots)
    yield _product(None, "output", 2 * D * model.vocabulary)
    yield Part(None, "elementwise", 0.0, *outer_elements(model))


def _feed_forward(model: Model, layer: int) -> Iterator[Part]:
    full, dots = model.remat == "full", model.remat in ("full", "dots")
    products = 3 if model.gated else 2
    dense = 2 * products * model.width * model.layer_width(layer)
    if blocks := of_blocks(model, layer):
        up, down = map(math.prod, blocks)
        dense = 2 * ((products - 1) * up + down)
    if not (model.experts and model.is_expert_layer(layer)):
        # A rematerialised period of layers, or dense first layer, does not need its last product again.
        last = layer < model.dense_first or model.is_expert_layer(layer)
        yield _product(layer, "feed-forward", dense, again=full * ((products - last) / products))
        return
    passed, places = experts_per_token(model), rows(model)
    yield _product(layer, "router", _router(model), again=full)
    yield _product(layer, "experts", passed * dense, executed=places / (passed * model.group_size), again=dots)
    if model.shared_experts:
        yield _product(layer, "shared experts", model.shared_experts * dense, again=full)
    if not skips_layers(model):
        yield from lookup("model.executor", MOVING, model.executor)(model, layer, places)


def _router(model: Model) -> float:
    return sum(2 * math.prod(shape) for shape in router_arrays(model).values() if len(shape) > 1)


def _product(layer: int | None, name: str, needed: float, executed: float = 1.0, again: float = 0.0) -> Part:
    """A matrix product of the mathematics, how many times as much of it the program runs, and the share run again."""
    run = executed * needed
    return Part(layer, name, needed, run, 2 * run, again * run)


def _einsum(model: Model, layer: int, places: int) -> Iterator[Part]:
    """Dispatch has one gradient, the 0s and 1s of its mask having none; combine has two."""
    contract, masks = 2 * places * model.width, 2 * model.top_k * places
    again = model.remat != "none"  # combine is the last product of a period
    if form(model) == "slots":  # mixtures are the mathematics itself, and both have a gradient
        yield _product(layer, "dispatch", contract, again=again)
        yield _product(layer, "combine", contract)
        return
    yield Part(layer, "dispatch", 0.0, contract + masks, contract, again * (contract + 2 * masks))
    yield Part(layer, "combine", 0.0, contract + masks, 2 * contract + masks)


def _moved(model: Model, layer: int, places: int) -> Iterator[Part]:
    """Rows are moved at no FLOPs; the K outputs of a token are weighted and added."""
    weighted = 2 * model.top_k * model.width
    yield Part(layer, "combine", 0.0, weighted, 2 * weighted)


MOVING = {"einsum": _einsum, "gather": _moved, "grouped": _moved}
