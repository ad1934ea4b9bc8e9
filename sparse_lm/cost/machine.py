"""Peak FLOP/s and memory bandwidth of accelerators, for a roofline (Williams, Waterman and Patterson 2009)."""

import re
from typing import NamedTuple


class Machine(NamedTuple):
    """Peaks of one device according to its maker, without structured sparsity.

    At jax's default precision, products of float32 run as bfloat16 on a TPU and as TF32 on a GPU.

    Attributes:
        name: of the device.
        bfloat16: FLOP/s of matrix products.
        float32: FLOP/s of matrix products at jax's default precision.
        bandwidth: bytes/s between the device and its memory.
        source: of these figures.
    """

    name: str
    bfloat16: float
    float32: float
    bandwidth: float
    source: str

    def peak_flops(self, dtype: str) -> float:
        """Returns the FLOP/s of matrix products of float32 or bfloat16."""
        return self.bfloat16 if dtype == "bfloat16" else self.float32


_TPU = "https://cloud.google.com/tpu/docs/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100"
_H100 = "https://www.nvidia.com/en-us/data-center/h100"
_H200 = "https://www.nvidia.com/en-us/data-center/h200"

# By a pattern for `jax.Device.device_kind`; the first that matches counts.
MACHINES: dict[str, Machine] = {
    r"TPU v4$": Machine("TPU v4", 275e12, 275e12, 1.2e12, _TPU + "v4"),
    r"TPU v5( lite|e)$": Machine("TPU v5e", 197e12, 197e12, 819e9, _TPU + "v5e"),
    r"TPU v5p?$": Machine("TPU v5p", 459e12, 459e12, 2.765e12, _TPU + "v5p"),
    r"TPU v6( lite|e)$": Machine("TPU v6e", 918e12, 918e12, 1.64e12, _TPU + "v6e"),
    r"A100.*80GB": Machine("A100 80 GB", 312e12, 156e12, 2.039e12, _A100),
    r"A100": Machine("A100 40 GB", 312e12, 156e12, 1.555e12, _A100),
    r"H100 PCIe": Machine("H100 PCIe", 756e12, 378e12, 2.0e12, _H100),
    r"H100": Machine("H100 SXM", 989e12, 494e12, 3.35e12, _H100),
    r"H200": Machine("H200", 989e12, 494e12, 4.8e12, _H200),
}


def find_machine(kind: str) -> Machine | None:
    """Finds a device kind such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3" in `MACHINES`; None if it is not there."""
    return next((known for pattern, known in MACHINES.items() if re.search(pattern, kind)), None)
