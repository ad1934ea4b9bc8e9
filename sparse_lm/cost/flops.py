"""Floating-point operations (FLOPs) per token: those of the mathematics, and those of the program.

Layers count their own (see `models.counting`); here they are added up over the stack. *Model* FLOPs are those of the
mathematics: K experts per token, L/2 keys per query on average, and 3 times the forward pass in training (a matrix
product has two gradients of its own size). By convention they leave out embedding look-ups and work per element (norms,
softmax, activations, the optimizer). *Executed* FLOPs are those of the compiled program: all L keys per query, empty
places of experts, the one-hot masks of the einsum executor, rematerialisation, and work per element.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_lm.config import Config, Model
from sparse_lm.cost.arrays import parameter_arrays
from sparse_lm.models.counting import Part, Setting, elementwise, product
from sparse_lm.models.functional import abstract_layer
from sparse_lm.parameter import is_hidden_matrix
from sparse_lm.stack import decoder_stack

# (forward, backward) FLOPs per element, see `models.counting`.
LOGIT = (3, 1)
OUTER_WIDTH = (9, 15)  # embedding and last norm

# Per parameter and step: gradient norm and clipping, moments, weight decay, and keeping the old value if not finite.
# An optimizer that is not here counts as AdamW.
OPTIMIZER_FLOPS = {"adamw": 34, "adafactor": 31, "muon": 34}
NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by part, and their sums, all of which include the routers'."""

    parts: tuple[Part, ...]

    @property
    def forward(self) -> float:
        return sum(part.model for part in self.parts)

    @property
    def training(self) -> float:
        return sum(part.model_training for part in self.parts)

    @property
    def router(self) -> float:
        """Model FLOPs of the routers in training, which the dense twin does not have."""
        return sum(part.model_training for part in self.parts if part.name == "router")

    @property
    def executed_forward(self) -> float:
        """The forward pass at the training capacity."""
        return sum(part.forward for part in self.parts)

    @property
    def executed_training(self) -> float:
        """Forward and backward pass, without the optimizer, which is counted per step (`step_flops`)."""
        return sum(part.training for part in self.parts)


def count_flops(model: Model, length: int, platform: str = "cpu") -> Flops:
    """Counts the FLOPs per token of a resolved model.

    Args:
        model: to count.
        length: L, tokens per row.
        platform: cpu, gpu or tpu, on which the executor `auto` depends, and so executed FLOPs.

    Raises:
        UserError: for an unknown executor.
    """
    return Flops(tuple(_count_parts(model, Setting(length, platform, model.remat))))


def step_flops(config: Config, platform: str) -> float:
    """Counts the executed FLOPs of a training step of a resolved config on all devices, including the optimizer."""
    tokens = config.training.batch * config.data.length
    return tokens * count_flops(config.model, config.data.length, platform).executed_training + optimizer_flops(config)


def optimizer_flops(config: Config) -> float:
    """Counts the FLOPs of an optimizer step; most of Muon's are products of Newton–Schulz iterations."""
    algorithm = config.optimizer.algorithm.name
    total = 0.0
    for array in parameter_arrays(config.model):
        total += OPTIMIZER_FLOPS.get(algorithm, OPTIMIZER_FLOPS["adamw"]) * array.size
        if algorithm == "muon" and is_hidden_matrix(array.axes):
            rows, columns = sorted(array.matrix_shape)
            matrices = array.size // (rows * columns)
            # X Xᵀ, its square, and their sum times X
            total += matrices * NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return total


def _count_parts(model: Model, setting: Setting) -> Iterator[Part]:
    stack = decoder_stack(model)
    count_layer = lambda spec, last: list(abstract_layer(model, spec).flops(setting._replace(last=last)))
    # A layer of the prefix and a period are recomputed as a whole, except for their last product.
    prefix = [count_layer(spec, True) for spec in stack.prefix]
    period = [count_layer(spec, i == len(stack.period) - 1) for i, spec in enumerate(stack.period)]
    for layer, parts in enumerate(prefix + period * stack.repeats):
        yield from (dataclasses.replace(part, layer=layer) for part in parts)
    yield product("output", 2 * model.width * model.vocabulary)
    yield from elementwise([(model.vocabulary, LOGIT), (model.width, OUTER_WIDTH)], setting._replace(remat="none"))
