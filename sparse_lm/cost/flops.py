"""Floating-point operations per token: what the mathematics needs, and what the program runs.

Each kind of layer counts its own (`models.counting` says how); here they are added up over the stack. *Model* FLOPs
are those of the mathematics: K experts per token, each query against the L/2 keys before it on average, 3 times the
forward pass in training (a matrix product has two gradients of its own size). Work per element (norms, softmax,
activations, the optimizer) is left out, as is usual, and looking up an embedding costs nothing. *Executed* FLOPs are
those of the compiled program: each query against all L keys, every place of an expert whether a token holds it or not,
the one-hot masks of the einsum executor, what rematerialisation computes again, and the work per element.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_lm.config import Config, Model
from sparse_lm.cost.arrays import parameter_arrays
from sparse_lm.models.counting import Part, Setting, elementwise, product
from sparse_lm.models.functional import abstract_layer
from sparse_lm.registry import lookup
from sparse_lm.stack import LayerSpec, decoder_stack

# (forward, backward) FLOPs per element, see `models.counting`.
LOGIT = (3, 1)
OUTER_WIDTH = (9, 15)  # embedding and last norm

# Per parameter and step: gradient norm and clipping, moments, weight decay, and keeping the old value if not finite.
OPTIMIZER_FLOPS = {"adamw": 34, "adafactor": 31, "muon": 34}
NEWTON_SCHULZ_STEPS = 5


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


def count_flops(model: Model, length: int, platform: str = "cpu") -> Flops:
    """FLOPs per token of a resolved model on rows of `length` tokens.

    platform: cpu, gpu or tpu, where `auto` has its executor; it makes a difference to executed FLOPs alone.

    Raises `UserError` for an unknown executor.
    """
    return Flops(tuple(_count_parts(model, Setting(length, platform, model.remat))))


def layer_flops(model: Model, spec: LayerSpec, setting: Setting) -> list[Part]:
    """FLOPs per token of one layer."""
    return list(abstract_layer(model, spec).flops(setting))


def step_flops(config: Config, platform: str) -> float:
    """Executed FLOPs of one training step of a resolved config over all devices of a platform, the optimizer's
    included."""
    tokens = config.training.batch * config.data.length
    return tokens * count_flops(config.model, config.data.length, platform).executed_training + optimizer_flops(config)


def optimizer_flops(config: Config) -> float:
    """FLOPs of one optimizer step; Muon's are mostly the matrix products of the Newton–Schulz iteration."""
    algorithm = config.optimizer.algorithm.name
    per_parameter = lookup("optimizer.algorithm.name", OPTIMIZER_FLOPS, algorithm)
    total = 0.0
    for array in parameter_arrays(config.model):
        total += per_parameter * array.size
        if algorithm == "muon" and array.orthogonalised:
            rows, columns = sorted(array.matrix)
            matrices = array.size // (rows * columns)
            # X Xᵀ, its square, and their sum times X
            total += matrices * NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return total


def _count_parts(model: Model, setting: Setting) -> Iterator[Part]:
    stack, counted = decoder_stack(model), []
    # A layer of the prefix, and a period, are computed again as a whole, and do not need their last product again.
    places = [(spec, True) for spec in stack.prefix]
    places += [(spec, at == len(stack.period) - 1) for at, spec in enumerate(stack.period)] * stack.repeats
    for layer, key in enumerate(places):
        if (parts := next((parts for known, parts in counted if known == key), None)) is None:
            parts = layer_flops(model, key[0], setting._replace(last=key[1]))
            counted.append((key, parts))
        yield from (dataclasses.replace(part, layer=layer) for part in parts)
    yield product("output", 2 * model.width * model.vocabulary)
    yield from elementwise([(model.vocabulary, LOGIT), (model.width, OUTER_WIDTH)], setting._replace(remat="none"))
