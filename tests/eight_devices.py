"""Run by test_mesh.py in a process with eight CPU devices: 20 steps of a tiny model on meshes of many shapes.

Prints what it finds as one line of JSON; the partitioner's warnings go to stderr.
"""

import json

import jax

from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh
from sparse_lm.training.build import build
from tests import tiny

MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "expert 8": {"expert": 8},
    "data 2, tensor 4": {"data": 2, "tensor": 4},
    "data 2, fsdp 2, expert 2": {"data": 2, "fsdp": 2, "expert": 2},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
}
SOME_MESHES = ("expert 8", "data 2, fsdp 2, expert 2", "fsdp 2, expert 2, tensor 2")
STEPS = 20
PADDING = (0, 3, 7, 1, 2, 0, 5, 12)


def main() -> None:
    found, start = {}, None
    for executor, names in {"gather": MESHES, "einsum": SOME_MESHES, "grouped": SOME_MESHES}.items():
        config = tiny.config(
            model__experts=8,
            model__kv_heads=4,
            model__executor=executor,
            model__router=tiny.switch(jitter=0.01, z_loss=0.001),
            training__batch=8,
        )
        if start is None:
            one = build(config, make_mesh(configs.Mesh(), jax.devices()[:1]))
            start = jax.device_get(one.init())
            found["one"] = run(one, start)
        for name in names:
            made = build(config, make_mesh(configs.Mesh(**{"data": 1} | MESHES[name]), jax.devices()))
            found[f"{executor}, {name}"] = run(made, start)
        if executor == "gather":
            tiny.equal(jax.device_get(made.init()), start)  # created sharded, the parameters are the same
    print(json.dumps(found))


def run(made, start) -> dict:
    state = jax.device_put(start, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_state))
    to_device = lambda batch: jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_batch))
    data = [to_device(tiny.batch(made.config, seed, PADDING)) for seed in range(4)]
    compilations = []
    listen = lambda event, *_, **__: compilations.append(event) if "backend_compile" in event else None
    step, text = made.step, None
    if made.mesh.shape["expert"] > made.mesh.shape["tensor"]:
        step = made.step.lower(made.abstract_state, made.abstract_batch).compile()
        text = step.as_text()
    jax.monitoring.register_event_duration_secs_listener(listen)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, data[number % 4])
        losses.append(metrics["loss"])
    jax.monitoring.unregister_event_duration_listener(listen)
    drifted = jax.tree.map(lambda x, a: not x.sharding.is_equivalent_to(a.sharding, x.ndim), state, made.abstract_state)
    assert not any(jax.tree.leaves(drifted)), drifted
    adam = next(part for part in state.optimizer if hasattr(part, "mu"))
    trees = {"weights": state.parameters, "mu": adam.mu, "nu": adam.nu}
    return {
        "losses": [float(loss) for loss in losses],
        "compilations": len(compilations),
        "program": text,
        "shards": {name: shard(tree) for name, tree in trees.items()},
    }


def shard(parameters: dict) -> tuple[int, ...]:
    """The shape of one device's part of the experts' first matrix, [layers, experts, width, hidden]."""
    into = parameters["period"][1]["feed_forward"]["experts"]["into"]
    return into.sharding.shard_shape(into.shape)


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    main()
