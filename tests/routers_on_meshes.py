"""Run by test_mesh.py in a process with eight CPU devices: steps of a tiny model with every router, executor and mesh.

Balance is over the whole batch, and nothing overflows a buffer: then all of them are to agree with one device. Prints
the largest differences as one line of JSON. Arguments: names of routers, all of them without; or "axes": one router, on
meshes of one axis or two.
"""

import itertools
import json
import math
import sys

import jax
import numpy as np

from sparse_lm import config as configs
from sparse_lm.experts import EXECUTORS
from sparse_lm.mesh import AXES, make_mesh
from sparse_lm.routing import ROUTERS
from sparse_lm.step.build import build
from tests import tiny
from tests.routing import table

MESHES = {
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp 2, expert 2, tensor 2": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
}
# Those of every axis alone and of every pair of axes that eight_devices.py has not.
FEW_AXES = {
    " × ".join(axes): {"data": 1} | dict.fromkeys(axes, 2)
    for axes in [("tensor",), *itertools.combinations(AXES, 2)]
    if axes != ("data", "tensor")
}
STEPS = 3
PADDING = (0, 3, 7, 1, 2, 0, 5, 12)


def main() -> None:
    found = {}
    names, meshes = sys.argv[1:] or list(ROUTERS), MESHES
    if names == ["axes"]:
        names, meshes = ["switch"], FEW_AXES
    for name in names:
        of_model = vars(table.config(name, balance_over="batch", kv_heads=4).model)
        fields = {f"model__{field}": value for field, value in of_model.items() if not field.startswith("_")}
        one = run(fields, "auto", {"data": 1}, 1)
        for executor in executors(name) if meshes is MESHES else ["gather"]:
            for mesh, sizes in meshes.items():
                many = run(fields, executor, sizes, math.prod(sizes.values()))
                found[f"{name}, {executor}, {mesh}"] = difference(many, one)
    print(json.dumps(found))


def executors(router: str) -> list[str]:
    """All that can express the router, by their own names; `auto` where no expert is executed."""
    if ROUTERS[router].skips_layers:
        return ["auto"]
    return [name for name, one in EXECUTORS.items() if name != "auto" and ROUTERS[router].form in one.forms]


def run(fields: dict, executor: str, sizes: dict, devices: int):
    """(losses, router state) after some steps."""
    config = tiny.config(**fields | {"model__executor": executor}, training__batch=8)
    made = build(config, make_mesh(configs.Mesh(**sizes), jax.devices()[:devices]))
    state, losses = made.init(), []
    for seed in range(STEPS):
        batch = tiny.batch(config, seed, PADDING)
        batch = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_batch))
        state, metrics = made.step(state, batch)
        losses.append(metrics["loss"])
    return jax.device_get((losses, state.router))


def difference(a, b) -> float:
    """The largest, as a share of the largest entry of each array."""
    share = lambda x, y: np.abs(x.astype(np.float64) - y).max() / max(np.abs(y).max(), 1e-30)
    return max(float(share(np.asarray(x), np.asarray(y))) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    main()
