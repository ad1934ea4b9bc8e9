"""How the time of a step, and of one expert layer, grows with the experts and with the tokens, at one per token.

    python -m experiments.benchmarks.growth --config=configs/quickstart.py [--experts=8,16,32,64,128,256,512]
        [--batches=8,32] [--rounds=15] [--config.model.executor=auto]

The layer is timed forward and backward, without the optimizer. Prints for each batch the median times over those of the
fewest experts, all in turns; the layer's time per token over that in the first batch; and the layer's share of the
machine's matrix-product speed.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.benchmarks.alternate import alternate, machine, ratio, share
from experiments.benchmarks.dense_twin import runs
from sparse_lm.command_line import define_config
from sparse_lm.config import Config, resolve
from sparse_lm.cost.flops import count_flops
from sparse_lm.cost.info import format_table
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.models import Context
from sparse_lm.models.expert_layer import ExpertLayer


def main() -> None:
    keep_freed_memory()
    values = flags.FlagValues()
    flags.DEFINE_list("experts", ["8", "16", "32", "64", "128", "256", "512"], "E", flag_values=values)
    flags.DEFINE_list("batches", ["8", "32"], "rows in a step", flag_values=values)
    flags.DEFINE_integer("rounds", 15, "turns", flag_values=values)
    define_config(values, sys.argv)
    values(sys.argv)
    fewest, first = values.experts[0], None
    rows = [("tokens", "E", f"step over E = {fewest}'s", f"layer over E = {fewest}'s", "per token", "of the machine")]
    for batch in map(int, values.batches):
        timed = {}
        for count in values.experts:
            config = _with(values.config, int(count), batch)
            timed |= {f"{count} step": runs(config)[0], f"{count} layer": layer(config)}
        times = alternate(timed | {"machine": machine()}, values.rounds)
        tokens = batch * config.data.length
        parts = count_flops(config.model, config.data.length).parts
        needed = tokens * next(part.model_training for part in parts if part.name == "experts")
        per_token = {count: np.median(times[f"{count} layer"]) / tokens for count in values.experts}
        first = first or per_token
        for count in values.experts:
            step, alone = (ratio(times, f"{count} {what}", f"{fewest} {what}") for what in ("step", "layer"))
            of_machine = share(times, f"{count} layer", needed)
            rows.append((str(tokens), count, step, alone, f"{per_token[count] / first[count]:.2f}", of_machine))
    print(format_table(rows))


def _with(config: Config, experts: int, batch: int) -> Config:
    model = dataclasses.replace(config.model, experts=experts, top_k=1)
    return resolve(dataclasses.replace(config, model=model, training=dataclasses.replace(config.training, batch=batch)))


def layer(config: Config):
    """The gradients of an expert layer of the config, by its parameters and its input, compiled."""
    model, rows = config.model, (config.training.batch, config.data.length)
    graph, state = nnx.split(ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(*rows, model.width)), jnp.float32)
    zeros = jnp.zeros(rows, jnp.int32)
    context = Context(zeros, jnp.ones(rows, jnp.int32), zeros, model.capacity_factor)

    @jax.jit
    def gradients(state, x):
        def total(state, x):
            y, aux = nnx.merge(graph, state)(x, context, {}, None, None)
            return (y * x).sum() + sum(aux.losses.values())

        return jax.grad(total, argnums=(0, 1))(state, x)

    return lambda: gradients(state, x)


if __name__ == "__main__":
    main()
