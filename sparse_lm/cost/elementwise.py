"""Executed work per element: norms, softmax, activations, rotary positions, routing, the optimizer.

The mathematics calls it nothing beside the matrix products, and at the width of a real model it is: a few FLOPs per
element against twice the width. In a model small enough for a laptop it is some percent, which a count that is to agree
with the compiler's can't leave out. The coefficients are FLOPs per element as XLA counts the compiled program (what it
fuses it may compute twice; exponentials are not FLOPs to it), measured by changing one size at a time, and rounded.
"""

from sparse_lm.config import Config, Model
from sparse_lm.cost.arrays import arrays
from sparse_lm.cost.routers import rows, skips_layers
from sparse_lm.registry import lookup

# (forward, backward) per element
WIDTH = (10, 28)  # of each layer: two norms, two residual additions
HIDDEN = {"gelu": (8, 32), "geglu": (9, 37), "swiglu": (5, 17)}  # per hidden unit
SCORE = (6, 11)  # per head and key
MASK = (3, 4)  # per key
ROTATED = (3, 7)  # per feature of the queries and keys
LOGIT = (3, 1)
OUTER_WIDTH = (9, 15)  # embedding and last norm
ROUTER_WIDTH = (60, 13)  # jitter, which is mostly making random numbers
ROUTER_EXPERT = (42, 16)  # per expert: softmax, placement, losses, health

# Per parameter and step: gradient norm and clipping, moments, weight decay, and keeping the old value if not finite.
OPTIMIZER = {"adamw": 34, "adafactor": 31, "muon": 34}
NEWTON_SCHULZ_STEPS = 5


def layer_elements(model: Model, layer: int, length: int) -> tuple[float, float]:
    """(forward, backward) FLOPs per token of the work per element in one layer."""
    expert_layer = model.is_expert_layer(layer) and model.experts > 0 and not skips_layers(model)
    hidden = model.layer_width(layer)
    if expert_layer:
        hidden *= rows(model) / model.group_size + model.shared_experts
    counted = [
        (model.width, WIDTH),
        (hidden, HIDDEN[model.activation]),
        (model.heads * length, SCORE),
        (length, MASK),
        ((model.heads + model.kv_heads) * model.head_width, ROTATED),
    ]
    if expert_layer:
        counted += [(model.width, ROUTER_WIDTH), (model.experts, ROUTER_EXPERT)]
    return sum(n * c[0] for n, c in counted), sum(n * c[1] for n, c in counted)


def outer_elements(model: Model) -> tuple[float, float]:
    """(forward, backward) FLOPs per token of the work per element outside the layers."""
    return tuple(model.vocabulary * v + model.width * w for v, w in zip(LOGIT, OUTER_WIDTH, strict=True))


def optimizer_flops(config: Config) -> float:
    """FLOPs of one optimizer step; Muon's are mostly the matrix products of the Newton–Schulz iteration."""
    algorithm = config.optimizer.algorithm.name
    per_parameter = lookup("optimizer.algorithm.name", OPTIMIZER, algorithm)
    total = 0.0
    for array in arrays(config.model):
        total += per_parameter * array.size
        if algorithm == "muon" and array.orthogonalised:
            rows, columns = sorted(array.matrix)
            matrices = array.size // (rows * columns)
            # X Xᵀ, its square, and their sum times X
            total += matrices * NEWTON_SCHULZ_STEPS * (4 * rows**2 * columns + 2 * rows**3)
    return total
