"""Bytes that hold parameters, gradients and optimizer state, together and on one device.

Parameters, their gradients and the optimizer's state are float32 whatever the model computes in. Activations are not
counted: they depend on what the compiler keeps, and it is the compiler that reports them.
"""

from dataclasses import dataclass

from sparse_lm.config import Config, Mesh
from sparse_lm.cost.arrays import ParameterArray, parameter_arrays
from sparse_lm.registry import lookup

FLOAT32 = 4  # bytes
FACTORED_FROM = 128  # entries that both of an array's largest dimensions have where Adafactor factors its moments


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def compute_memory(config: Config, mesh: Mesh | None = None) -> Memory:
    """Memory of a resolved config's training state in bytes: of all of it once, or of one device's part of a mesh
    whose sizes are all given.

    Raises `UserError` for an unknown optimizer.
    """
    state = lookup("optimizer.algorithm.name", STATE_SIZES, config.optimizer.algorithm.name)
    parameters = optimizer = 0
    for array in parameter_arrays(config.model):
        local = array.on_device(mesh) if mesh else array
        parameters += local.size
        optimizer += state(array, local)
    return Memory(FLOAT32 * parameters, FLOAT32 * parameters, FLOAT32 * optimizer)


def _adam(array: ParameterArray, local: ParameterArray) -> int:
    return 2 * local.size


def _muon(array: ParameterArray, local: ParameterArray) -> int:
    return local.size if array.orthogonalised else _adam(array, local)


def _adafactor(array: ParameterArray, local: ParameterArray) -> int:
    """In the second moment's place its means over each of the two largest dimensions, where both are large enough."""
    lead = array.axes[0] in ("experts", "blocks")
    dimensions = sorted(range(lead, len(array.shape)), key=lambda i: array.shape[i])[-2:]
    if len(dimensions) == 2 and array.shape[dimensions[0]] >= FACTORED_FROM:
        return sum(local.size // local.shape[i] for i in dimensions)
    return local.size


# From an array and the part of it on a device to the numbers of state that the device keeps for it.
STATE_SIZES = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}
