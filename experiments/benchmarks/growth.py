"""How the time of an expert layer grows with the experts and with the tokens, at one expert per token.

    python -m experiments.benchmarks.growth [--experts=8,16,32,64,128,256,512] [--tokens=4096,16384] [--rounds=15]
        [--width=128] [--expert_width=512] [--executor=auto] [--capacity_factor=1.25]

Prints the median time of the layer forward and backward, without optimizer, over that of the fewest experts, in turns.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from experiments.benchmarks.alternate import alternate, machine, ratio, share
from sparse_lm import config as configs
from sparse_lm.cost.info import table
from sparse_lm.models.layer import Context, ExpertLayer

LENGTH = 128


def main() -> None:
    values = flags.FlagValues()
    flags.DEFINE_list("experts", ["8", "16", "32", "64", "128", "256", "512"], "E", flag_values=values)
    flags.DEFINE_list("tokens", ["4096", "16384"], "in a step", flag_values=values)
    flags.DEFINE_integer("rounds", 15, "turns", flag_values=values)
    flags.DEFINE_integer("width", 128, "D", flag_values=values)
    flags.DEFINE_integer("expert_width", 512, "F", flag_values=values)
    flags.DEFINE_string("executor", "auto", "", flag_values=values)
    flags.DEFINE_float("capacity_factor", 1.25, "", flag_values=values)
    values(sys.argv)
    experts = list(map(int, values.experts))
    rows = [("tokens", "E", f"time over E = {experts[0]}", "of the machine")]
    for tokens in map(int, values.tokens):
        layers = {str(count): layer(values, count, tokens) for count in experts}
        times = alternate(layers | {"machine": machine()}, values.rounds)
        needed = 3 * tokens * 2 * values.width * (2 * values.expert_width)
        for name in layers:
            rows.append((str(tokens), name, ratio(times, name, str(experts[0])), share(times, name, needed)))
    print(table(rows))


def layer(values: flags.FlagValues, experts: int, tokens: int):
    config = configs.Config()
    config.model = configs.Model(
        width=values.width,
        ffn_width=values.expert_width,
        experts=experts,
        executor=values.executor,
        capacity_factor=values.capacity_factor,
    )
    config.data.length = LENGTH
    model = configs.resolve(config).model
    graph, state = nnx.split(ExpertLayer(model, nnx.Rngs(params=0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(tokens // LENGTH, LENGTH, values.width)), jnp.float32)
    rows = x.shape[:2]
    context = Context(
        jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32), None, values.capacity_factor
    )

    @jax.jit
    def gradients(state, x):
        def total(state, x):
            y, aux = nnx.merge(graph, state)(x, context, {}, None, None)
            return (y * x).sum() + sum(aux.losses.values())

        return jax.grad(total, argnums=(0, 1))(state, x)

    return lambda: gradients(state, x)


if __name__ == "__main__":
    main()
