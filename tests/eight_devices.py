"""Run by test_mesh.py in a process with eight CPU devices: 20 steps of a tiny model on meshes of many shapes; a layer
that overflows the buffers of its exchange; sums over the groups of each device.

Prints what it finds as one line of JSON; the partitioner's warnings go to stderr.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.models.context import Context
from sparse_lm.models.expert_layer import ExpertLayer
from sparse_lm.routing.losses import by_region
from sparse_lm.step.build import build
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
OVERFLOWING = {"data 2, expert 4": {"data": 2, "expert": 4}, "expert 4, tensor 2": {"expert": 4, "tensor": 2}}


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
            made = build(config, mesh_of(MESHES[name]))
            found[f"{executor}, {name}"] = run(made, start)
        if executor == "gather":
            tiny.equal(jax.device_get(made.init()), start)  # created sharded, the parameters are the same
    overflows = {name: overflow(mesh_of(sizes), sizes["expert"]) for name, sizes in OVERFLOWING.items()}
    print(json.dumps({"runs": found, "overflows": overflows, "regions": regions(), "dropout masks": dropout_masks()}))


def mesh_of(sizes):
    return make_mesh(configs.Mesh(**{"data": 1} | sizes), jax.devices())


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


def overflow(mesh, devices: int) -> dict:
    """An expert layer in training, with buffers for half of an even share of rows; and without what overflows."""
    router = configs.choice("topk", normalize=False)  # a choice's weight is then its own
    fields = dict(experts=8, top_k=2, executor="grouped", exchange_buffer=0.5, capacity_factor=math.inf, router=router)
    model = tiny.config(**{f"model__{name}": value for name, value in fields.items()}, training__batch=8).model
    graph, state = nnx.split(ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)))
    random = np.random.default_rng(0)
    x, dy = random.normal(size=(2, 8, 16, model.width)).astype(np.float32)
    valid, at = np.arange(16) < 16 - np.array(PADDING)[:, None], jnp.zeros((8, 16), jnp.int32)
    context = Context(at, jnp.asarray(valid, jnp.int32), at, math.inf)

    @jax.jit
    def run(x, given):
        def layer(x):
            y, aux = nnx.merge(graph, state)(x, context, {}, jax.random.key(0), given)
            return y, (aux.statistics["dropped"], aux.chosen)

        y, vjp, seen = jax.vjp(layer, x, has_aux=True)
        return y, vjp(jnp.asarray(dy))[0], *seen

    with jax.set_mesh(mesh):
        y, dx, dropped, chosen = jax.device_get(run(x, None))
    overflowing = find_overflowing(chosen, mesh.shape["data"], devices)
    *expected, _, _ = jax.device_get(run(x, np.where(overflowing, -1, chosen)))
    nowhere = valid & (overflowing | (chosen < 0)).all(axis=-1)
    return {
        "dropped": float(dropped),
        "counted": int(overflowing.sum()),
        "choices": int((chosen >= 0).sum()),
        "tokens without output": int(nowhere.sum()),
        "their output": float(np.abs(y[nowhere]).max()),
        "difference": max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip((y, dx), expected)),
    }


def find_overflowing(chosen, parts: int, devices: int):
    """Which choices [G, S, K] of 8 experts overflow the buffer of their expert's device, which holds half as many rows
    as a device begins with. The groups are divided into parts, and those over the devices."""
    overflowing = np.zeros(chosen.shape, bool)
    for part in np.split(np.arange(len(chosen)), parts):
        for receiver in range(devices):
            free = math.ceil(0.5 * chosen[part].size / devices)
            for groups in np.split(part, devices):
                for expert in range(receiver * 8 // devices, (receiver + 1) * 8 // devices):
                    for g, s, k in zip(*np.nonzero(chosen[groups] == expert)):
                        overflowing[groups[g], s, k] = free <= 0
                        free -= 1
    return overflowing


def dropout_masks() -> int:
    """How many different choices of hidden units to drop eight devices make, all with the same tokens and experts."""
    fields = dict(
        experts=8, executor="grouped", expert_dropout=0.5, capacity_factor=math.inf, router=tiny.switch(jitter=0.0)
    )
    model = tiny.config(**{f"model__{name}": value for name, value in fields.items()}, training__batch=8).model
    layer = ExpertLayer(model, model.expert_width, nnx.Rngs(params=0))
    row = np.random.default_rng(0).normal(size=(1, 16, model.width)).astype(np.float32)
    one = jnp.ones((8, 16), jnp.int32)
    with jax.set_mesh(mesh_of({"data": 8})):
        y, _ = nnx.jit(lambda layer, x: layer(x, Context(one, one, one, math.inf), {}, jax.random.key(0)))(
            layer, jnp.asarray(np.repeat(row, 8, axis=0))
        )
    return len({group.tobytes() for group in np.asarray(y)})


def regions() -> dict:
    """Sums over the groups of each device by the library, and over what each device holds."""
    mesh = mesh_of({"data": 2, "expert": 2, "tensor": 2})
    x = jax.device_put(np.arange(8 * 3, dtype=np.float32).reshape(8, 3) ** 2, sharding(mesh, "groups", None))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: by_region(x, "device"))(x)
    held = {shard.index[0].start: np.asarray(shard.data).sum(axis=0).tolist() for shard in x.addressable_shards}
    return {"found": found.tolist(), "held": [held[start] for start in sorted(held)]}


if __name__ == "__main__":
    assert len(jax.devices()) == 8
    main()
