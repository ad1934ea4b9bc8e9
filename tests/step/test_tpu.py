"""Whole training steps of every executor, and of a block-sparse model, compiled by the TPU compiler without a TPU."""

import pytest

COMPILE = """
import math, sys
from jax.experimental import topologies
from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh
from sparse_lm.step.build import build

DROPLESS = dict(experts=8, top_k=2, router=configs.choice("topk"), capacity_factor=math.inf)
MODELS = {
    "grouped": DROPLESS | dict(executor="grouped"),
    "gather": DROPLESS | dict(executor="gather", capacity_factor=1.25),
    "einsum": DROPLESS | dict(executor="einsum", capacity_factor=1.25),
    "soft": dict(experts=8, router=configs.choice("soft"), capacity_factor=1.0),
    "block-sparse": dict(layout=configs.choice("small_world", density=0.5, block=128)),
}
for target in sys.argv[1:]:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    for name, fields in MODELS.items():
        config = configs.Config()
        sizes = dict(vocabulary=2048, width=256, heads=4, ffn_width=512, expert_width=512, dtype="bfloat16")
        config.model = configs.Model(**sizes, **fields)
        config.data.length, config.training.batch = 256, 4 * len(devices)
        config.mesh = configs.Mesh(data=1, fsdp=2, expert=len(devices) // 2 if "experts" in fields else 1)
        config.mesh.data = len(devices) // (config.mesh.fsdp * config.mesh.expert)
        made = build(configs.resolve(config), make_mesh(config.mesh, devices))
        lowered = made.step.lower(made.abstract_state, made.abstract_batch)
        lowered.compile()
        text = lowered.as_text()
        print(target, name, text.count("ragged_all_to_all"), text.count("@tpu_custom_call"))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_every_step(tpu_compiler):
    """Rows that are sorted travel by ragged all-to-alls, there and back, and back again for the gradients; each of the
    two products of an expert has a kernel, and two for its gradients, and so has each of a matrix of blocks."""
    targets = ("v5e:2x4", "v5p:2x2x2", "v6e:2x4")
    found = tpu_compiler(COMPILE, *targets).splitlines()
    kernels = {"grouped": "4 6", "gather": "0 0", "einsum": "0 0", "soft": "0 0", "block-sparse": "0 6"}
    assert found == [f"{target} {name} {count}" for target in targets for name, count in kernels.items()]
