"""Run by test_adding.py in a process with eight CPU devices: steps of a model with each of what is added, on a mesh
over all of them and on one device. Prints the losses, and a device's share of the parameters, as one line of JSON."""

import json

import jax

from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh
from sparse_lm.step.build import build
from tests import tiny
from tests.added.table import FIELDS, add

MESHES = {"one": {}, "eight": {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}}


def main() -> None:
    add()
    found = {}
    for name, fields in FIELDS.items():
        config = tiny.config(**fields, training__batch=8)
        for mesh, sizes in MESHES.items():
            devices = jax.devices()[:1] if mesh == "one" else jax.devices()
            made = build(config, make_mesh(configs.Mesh(**sizes), devices))
            state, losses = made.init(), []
            for seed in range(3):
                state, metrics = made.step(state, tiny.batch(config, seed))
                losses.append(float(metrics["loss"]))
            leaves = jax.tree.leaves(state.parameters)
            held = sum(leaf.addressable_shards[0].data.size for leaf in leaves) / sum(leaf.size for leaf in leaves)
            found[f"{name}, {mesh}"] = {"losses": losses, "held": held}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
