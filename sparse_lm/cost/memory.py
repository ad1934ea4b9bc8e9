"""Bytes of parameters, gradients and optimizer state, in total and on one device.

All three are float32, whatever the model computes in. Activations are not counted: they depend on the compiler, which
reports them.
"""

from dataclasses import dataclass

from sparse_lm.config import Config, Mesh
from sparse_lm.cost.arrays import ParameterArray, parameter_arrays
from sparse_lm.registry import lookup

FLOAT32 = 4  # bytes
FACTORED_FROM = 128  # Adafactor factors the moments of arrays whose two largest dimensions are at least this


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
    """Computes the memory of the training state of a resolved config.

    Args:
        config: whose model and optimizer are counted.
        mesh: without -1, to count one device's part; None: to count the whole state once.

    Raises:
        UserError: for an unknown optimizer.
    """
    state_size = lookup("optimizer.algorithm.name", STATE_SIZES, config.optimizer.algorithm.name)
    parameters = optimizer = 0
    for array in parameter_arrays(config.model):
        local = array.shard(mesh) if mesh else array
        parameters += local.size
        optimizer += state_size(array, local)
    return Memory(FLOAT32 * parameters, FLOAT32 * parameters, FLOAT32 * optimizer)


def _adam(array: ParameterArray, local: ParameterArray) -> int:
    return 2 * local.size


def _muon(array: ParameterArray, local: ParameterArray) -> int:
    return local.size if array.orthogonalised else _adam(array, local)


def _adafactor(array: ParameterArray, local: ParameterArray) -> int:
    """Counts the means of the second moment over each of the two largest dimensions, if both are large enough."""
    first = array.axes[0] in ("experts", "blocks")
    dimensions = sorted(range(first, len(array.shape)), key=lambda i: array.shape[i])[-2:]
    if len(dimensions) == 2 and array.shape[dimensions[0]] >= FACTORED_FROM:
        return sum(local.size // local.shape[i] for i in dimensions)
    return local.size


# Functions of an array and its part on a device, which count the entries of optimizer state on the device.
STATE_SIZES = {"adamw": _adam, "adafactor": _adafactor, "muon": _muon}
