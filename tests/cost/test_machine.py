"""Peaks of known accelerators, against what follows from their clocks and units."""

import pytest

from sparse_lm.cost.machine import MACHINES, find_machine


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5e", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v6e", "TPU v6e"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_kinds_of_devices_are_known(kind, name):
    assert find_machine(kind).name == name


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "TPU v7x", "Tesla T4"])
def test_other_kinds_are_not(kind):
    assert find_machine(kind) is None


def test_tensor_cores_times_their_clock():
    """bfloat16 FLOPs per clock and multiprocessor, multiprocessors, and boost clock, as in the makers' papers."""
    for name, per_clock, processors, clock in [
        ("A100", 2048, 108, 1.41e9),
        ("H100 PCIe", 4096, 114, 1.62e9),
        ("H100", 4096, 132, 1.83e9),
        ("H200", 4096, 132, 1.83e9),
    ]:
        assert find_machine(name).bfloat16 == pytest.approx(per_clock * processors * clock, rel=0.01)
        assert find_machine(name).float32 == pytest.approx(find_machine(name).bfloat16 / 2, rel=0.01)


def test_memory_and_products_have_the_right_size():
    """Between 100 and 600 bfloat16 FLOPs per byte, as all accelerators of these years."""
    for known in MACHINES.values():
        assert 100 < known.bfloat16 / known.bandwidth < 600
        assert known.source.startswith("https://")
        assert known.peak_flops("bfloat16") == known.bfloat16 and known.peak_flops("float32") == known.float32
