"""Grouped matrix multiplication against one dense product of as many FLOPs, in turns.

    python -m experiments.benchmarks.grouped_matmul [--shapes=4096,8,128,512 --shapes=…] [--rounds=30] [--aligned=0]

A shape is tokens, experts, D and F; both D → F and F → D are timed. Tokens fall on experts at random, the fullest with
some 1.5 to 3 times an even share, and each expert's rows are padded to the alignment, at the grouped side's expense.
Prints the median ratio of times with its quartiles, of the product alone and of the product with both gradients.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks.alternate import alternate, machine, ratio, share
from sparse_lm.cost.info import format_table
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.kernels import choose_alignment, grouped_matmul

SHAPES = [
    "4096,8,128,512",
    "8192,8,128,512",
    "4096,64,128,512",
    "8192,64,128,512",
    "4096,256,128,512",
    "4096,8,512,2048",
]


def main() -> None:
    keep_freed_memory()
    values = flags.FlagValues()
    flags.DEFINE_multi_string("shapes", SHAPES, "tokens,E,D,F", flag_values=values)
    flags.DEFINE_integer("rounds", 30, "turns", flag_values=values)
    flags.DEFINE_integer("aligned", 0, "rows; 0: as the platform likes it", flag_values=values)
    values(sys.argv)
    rows = [("tokens", "E", "product", "aligned", "rows added", "fullest", "alone", "with gradients", "of the machine")]
    for shape in values.shapes:
        tokens, experts, width, columns = map(int, shape.split(","))
        for d, f in ((width, columns), (columns, width)):
            aligned = values.aligned or choose_alignment(jax.default_backend(), tokens, experts)
            sizes = draw(tokens, experts)
            padded = -(-sizes // aligned) * aligned
            runs = sides(tokens, experts, d, f, padded, aligned)
            times = alternate(runs | {"machine": machine()}, values.rounds)
            rows.append((
                str(tokens),
                str(experts),
                f"{d} → {f}",
                str(aligned),
                f"{padded.sum() / tokens - 1:.0%}",
                f"{sizes.max() * experts / tokens:.1f}",
                ratio(times, "grouped", "dense"),
                ratio(times, "grouped gradients", "dense gradients"),
                share(times, "grouped gradients", 3 * 2 * tokens * d * f),
            ))  # fmt: skip
    print(format_table(rows))


def draw(tokens: int, experts: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.multinomial(tokens, generator.dirichlet(np.full(experts, 6.0)))


def sides(tokens: int, experts: int, d: int, f: int, sizes: np.ndarray, aligned: int):
    generator = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(generator.normal(size=shape), jnp.float32)
    room = tokens + experts * (aligned - 1)
    room = -(-room // aligned) * aligned
    sizes = jnp.asarray(sizes, jnp.int32)
    grouped = lambda x, w: grouped_matmul(x, w, sizes, aligned=aligned)
    made = {
        "grouped": (grouped, array(room, d), array(experts, d, f), array(room, f)),
        "dense": (jnp.dot, array(tokens, d), array(d, f), array(tokens, f)),
    }
    runs = {}
    for name, (product, x, w, g) in made.items():

        def both(x, w, g, product=product):
            y, backward = jax.vjp(product, x, w)
            return y, backward(g)

        runs[name] = partial(jax.jit(product), x, w)
        runs[f"{name} gradients"] = partial(jax.jit(both), x, w, g)
    return runs


if __name__ == "__main__":
    main()
