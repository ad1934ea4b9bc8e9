"""A sparse training step over its dense twin's, in turns in one process.

    python -m experiments.benchmarks.dense_twin --config=configs/quickstart.py [--rounds=20] [--experts=8,16,64,128]
        [--top_k=1,2] [--executors=auto,einsum,gather,grouped] [--config.model.capacity_factor=…]

Prints for each number of experts, K and executor the median ratio of step times to the dense twin of equal FLOPs per
token, with quartiles: the whole step, and loss and gradients alone, without the optimizer's time for more parameters;
the step's ratio to the fastest executor's, which shows whether `auto` chose right; and the share of the machine's own
matrix-product speed that loss and gradients reach, by the FLOPs that are needed.
"""

import dataclasses
import sys

import jax
import numpy as np
from absl import flags

from experiments.benchmarks.alternate import alternate, machine, ratio, share
from sparse_lm.command_line import define_config
from sparse_lm.config import Config, choice, resolve
from sparse_lm.cost.flops import count_flops
from sparse_lm.cost.info import format_table
from sparse_lm.cost.twin import dense_twin
from sparse_lm.experts.auto import executor_name
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.mesh import make_mesh
from sparse_lm.models.expert_layer import router_of
from sparse_lm.profile.measure import random_batch
from sparse_lm.step.build import build
from sparse_lm.step.loss import loss


def main() -> None:
    keep_freed_memory()
    values = flags.FlagValues()
    flags.DEFINE_integer("rounds", 20, "turns", flag_values=values)
    flags.DEFINE_list("experts", ["8", "16", "64", "128"], "E", flag_values=values)
    flags.DEFINE_list("top_k", ["1", "2"], "K", flag_values=values)
    flags.DEFINE_list("executors", ["auto", "einsum", "gather", "grouped"], "", flag_values=values)
    define_config(values, sys.argv)
    values(sys.argv)
    rows = [("E", "K", "executor", "step", "over the fastest", "without optimizer", "of the machine")]
    for k in map(int, values.top_k):
        for experts in map(int, values.experts):
            sparse = _with(values.config, experts, k)
            rows += measure(sparse, values.executors, values.rounds)
    print(format_table(rows))


def _with(config: Config, experts: int, k: int) -> Config:
    router = config.model.router if k == 1 else choice("topk")
    model = dataclasses.replace(config.model, experts=experts, top_k=k, router=router)
    return resolve(dataclasses.replace(config, model=model))


def measure(sparse: Config, executors: list[str], rounds: int) -> list[tuple[str, ...]]:
    configs = {"dense": dense_twin(sparse)}
    for name in executors:
        configs[name] = resolve(dataclasses.replace(sparse, model=dataclasses.replace(sparse.model, executor=name)))
    programs = {name: runs(config) for name, config in configs.items()}
    steps = alternate({name: step for name, (step, _) in programs.items()}, rounds)
    gradients = alternate({name: run for name, (_, run) in programs.items()} | {"machine": machine()}, rounds)
    needed = sparse.training.batch * sparse.data.length * count_flops(sparse.model, sparse.data.length).training
    fastest = min(set(executors) - {"auto"} or executors, key=lambda name: np.median(steps[name]))
    chosen = executor_name(sparse.model, router_of(sparse.model).form, jax.default_backend())
    return [
        (
            str(sparse.model.experts),
            str(sparse.model.top_k),
            f"auto: {chosen}" if name == "auto" else name,
            ratio(steps, name, "dense"),
            f"{np.median(steps[name] / steps[fastest]):.2f}",
            ratio(gradients, name, "dense"),
            share(gradients, name, needed),
        )
        for name in executors
    ]


def runs(config: Config):
    """(a training step, loss and gradients alone), on random tokens."""
    program = build(config, make_mesh(config.mesh))
    batch = random_batch(program)
    held = [program.init()]

    def step():
        held[0], metrics = program.step(held[0], batch)
        return metrics

    differentiate = jax.jit(jax.grad(loss, has_aux=True), static_argnums=(1, 4))
    key, factor = jax.random.key(0), config.model.capacity_factor

    def gradients():
        with jax.set_mesh(program.mesh):
            return differentiate(held[0].parameters, program.functional, held[0].router, batch, factor, key)

    return step, gradients


if __name__ == "__main__":
    main()
