"""A sparse training step over its dense twin's, alternated in one process.

    python experiments/benchmarks/dense_twin.py --config=configs/quickstart.py [--rounds=30] [--config.model.experts=16]

Prints the median ratio of step times with its quartiles, with the optimizer and without (loss and gradients alone).
"""

import sys
import time

import jax
import numpy as np
from absl import flags

from sparse_lm.command_line import define_config
from sparse_lm.config import resolve
from sparse_lm.cost.twin import twin
from sparse_lm.mesh import make_mesh
from sparse_lm.training.build import build
from sparse_lm.training.loss import loss


def main() -> None:
    values = flags.FlagValues()
    flags.DEFINE_integer("rounds", 30, "alternations", flag_values=values)
    define_config(values, sys.argv)
    values(sys.argv)
    sparse = resolve(values.config)
    sides = {"sparse": sparse, "dense": twin(sparse)}
    steps = {name: make_steps(config) for name, config in sides.items()}
    for what in ("step", "loss and gradients"):
        times = {name: [] for name in sides}
        for _ in range(values.rounds):
            for name in sides:
                run = steps[name][what]
                start = time.perf_counter()
                jax.block_until_ready(run())
                times[name].append(time.perf_counter() - start)
        ratio = np.array(times["sparse"]) / np.array(times["dense"])
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        print(f"{what}: sparse / dense = {middle:.3f} (quartiles {low:.3f} to {high:.3f}, {values.rounds} rounds)")


def make_steps(config):
    program = build(config, make_mesh(config.mesh))
    rows, length = config.training.batch, config.data.length
    ids = np.random.default_rng(0).integers(0, config.model.vocabulary, (rows, length + 1))
    batch = {
        "inputs": ids[:, :-1],
        "targets": ids[:, 1:],
        "segments": np.ones((rows, length)),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "bytes": np.full(rows, length),
    }
    batch = {k: jax.device_put(v.astype(np.int32), program.abstract_batch[k].sharding) for k, v in batch.items()}
    held = [program.init()]

    def step():
        held[0], metrics = program.step(held[0], batch)
        return metrics

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 4))
    key, factor = jax.random.key(0), config.model.capacity_factor
    gradients = lambda: differentiate(held[0].parameters, program.functional, held[0].router, batch, factor, key)
    for run in (step, gradients):  # compiles
        jax.block_until_ready(run())
    return {"step": step, "loss and gradients": gradients}


if __name__ == "__main__":
    main()
