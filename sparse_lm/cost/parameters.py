"""Counts the parameters of a model, and those that one token uses."""

from dataclasses import dataclass, fields

from sparse_lm.config import Model
from sparse_lm.cost.arrays import parameter_arrays
from sparse_lm.models.expert_layer import experts_per_token


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part. `experts` counts all experts, `active_experts` those that one token uses."""

    embedding: int = 0
    attention: int = 0
    feed_forward: int = 0  # of dense layers
    experts: int = 0
    shared_experts: int = 0
    router: int = 0
    norms: int = 0
    output: int = 0  # 0 if it is the transposed embedding
    active_experts: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "active_experts")

    @property
    def active(self) -> int:
        """Parameters that one token uses: all but other experts. By convention the whole embedding counts."""
        return self.total - self.experts + self.active_experts


def count_parameters(model: Model, layer: int | None = None) -> Parameters:
    """Counts the parameters of a resolved model, or of one of its layers."""
    counts: dict[str, int] = {}
    for array in parameter_arrays(model):
        if layer is None or array.layer == layer:
            counts[array.part] = counts.get(array.part, 0) + array.size
    if "experts" in counts:
        counts["active_experts"] = round(counts["experts"] / model.experts * experts_per_token(model))
    return Parameters(**counts)
