"""The Pallas kernels of block-sparse products, compiled for real TPU targets by the TPU compiler, without a TPU."""

import pytest

TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from sparse_lm.config import choice
from sparse_lm.kernels.block_sparse import block_sparse_matmul
from sparse_lm.layouts import build_layout

def both(made, x, blocks, gradient):
    y, backward = jax.vjp(lambda x, blocks: block_sparse_matmul(x, blocks, made), x, blocks)
    return y, backward(gradient)

for target in sys.argv[1:]:
    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for dtype in ("bfloat16", "float32"):
        for block, tokens, widths in ((128, 1000, (1024, 4096)), (256, 8192, (4096, 1024)), (128, 4096, (32768, 1024))):
            made = build_layout(choice("small_world", density=1 / 4, block=block), *widths, "layout")
            shapes = ((tokens, widths[0]), (made.num_blocks, block, block), (tokens, widths[1]))
            arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
            text = jax.jit(both, static_argnums=0).lower(made, *arrays).compile().as_text()
            print(target, dtype, block, text.count('custom_call_target="tpu_custom_call"'))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernels(tpu_compiler):
    """Forward and both gradients, one kernel each."""
    cases = [
        (target, dtype, b) for target in TARGETS for dtype in ("bfloat16", "float32") for b in ("128", "256", "128")
    ]
    assert tpu_compiler(COMPILE, *TARGETS).splitlines() == [f"{target} {dtype} {b} 3" for target, dtype, b in cases]
