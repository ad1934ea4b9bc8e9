"""Each router's share of a training step.

    python -m experiments.benchmarks.router_cost --config=configs/quickstart.py [--routers=switch,hash] [--rounds=20]

Prints for each router the time of routing every expert layer, forward and backward, over the time of the whole step,
and the step's time over that of the first router, all in turns.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.benchmarks.alternate import alternate, ratio
from experiments.benchmarks.dense_twin import runs
from experiments.routers import CHOICES
from sparse_lm.command_line import define_config
from sparse_lm.config import Config, resolve
from sparse_lm.cost.info import format_table
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS, ExpertChoice, SoftSlots
from sparse_lm.stack import decoder_stack


def main() -> None:
    keep_freed_memory()
    values = flags.FlagValues()
    flags.DEFINE_integer("rounds", 20, "turns", flag_values=values)
    flags.DEFINE_list("routers", list(CHOICES), "", flag_values=values)
    define_config(values, sys.argv)
    values(sys.argv)
    programs = {}
    for name in values.routers:
        model = dataclasses.replace(values.config.model, **CHOICES[name])
        config = resolve(dataclasses.replace(values.config, model=model))
        programs[name] = runs(config)[0]
        programs[f"{name} alone"] = alone(config)
    times = alternate(programs, values.rounds)
    first = values.routers[0]
    rows = [("router", "share of its step", f"step over {first}'s")]
    rows += [(name, ratio(times, f"{name} alone", name), ratio(times, name, first)) for name in values.routers]
    print(format_table(rows))


def alone(config: Config):
    """Routing a step's tokens in all expert layers, one after the other, with the gradients of router and features."""
    model, batch = config.model, config.training.batch
    router = create("model.router", ROUTERS, model.router, model, nnx.Rngs(params=0))
    graph, parameters = nnx.split(router)
    groups = batch * config.data.length // model.group_size
    x = jnp.asarray(np.random.default_rng(0).normal(size=(groups, model.group_size, model.width)), jnp.float32)
    ids, valid = jnp.ones(x.shape[:2], jnp.int32), jnp.ones(x.shape[:2], bool)
    state, key = router.init_state(), jax.random.key(0)

    def total(parameters, x):
        choice, losses, statistics = nnx.merge(graph, parameters).route(x, ids, valid, state, key)
        weight = choice.combine + choice.dispatch if isinstance(choice, SoftSlots) else choice.weight
        index = choice.token if isinstance(choice, ExpertChoice) else getattr(choice, "expert", jnp.zeros(()))
        return weight.sum() + sum(losses.values()), (index.sum(), statistics)

    @jax.jit
    def route(parameters, x):
        one = lambda x, _: (x + 1e-6 * jax.grad(total, argnums=1, has_aux=True)(parameters, x)[0], None)
        return jax.lax.scan(one, x, length=len(decoder_stack(model).routed_layers))[0]

    return lambda: route(parameters, x)


if __name__ == "__main__":
    main()
