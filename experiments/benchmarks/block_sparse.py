"""A block-sparse matrix product over the dense one at densities 1/2 … 1/16: forward and both gradients, on CPU.

    python -m experiments.benchmarks.block_sparse [--tokens=1024] [--width=2048] [--hidden=8192] [--block=128]
        [--layout=small_world] [--rounds=15]

For x [tokens, width] by [width, hidden] and for the way back, [tokens, hidden] by [hidden, width], all in float32,
alternated round by round. For each density: the median ratio of times with its quartiles; that ratio over the density,
which is 1 where time is proportional to the blocks that exist; and the rate over that of a large square product.
"""

import sys

import jax
import numpy as np
from absl import flags

from experiments.benchmarks.alternate import alternate, machine, ratio, share
from sparse_lm.config import choice
from sparse_lm.errors import UserError
from sparse_lm.host_memory import keep_freed_memory
from sparse_lm.kernels.block_sparse import block_sparse_matmul
from sparse_lm.layouts import build_layout

DENSITIES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)


def main() -> None:
    keep_freed_memory()
    values = flags.FlagValues()
    for name, default, what in (
        ("tokens", 1024, "rows of x"),
        ("width", 2048, "features of one side"),
        ("hidden", 8192, "features of the other"),
        ("block", 128, "rows and columns of a block"),
        ("rounds", 15, "alternations"),
    ):
        flags.DEFINE_integer(name, default, what, flag_values=values)
    flags.DEFINE_string("layout", "small_world", "which blocks exist", flag_values=values)
    values(sys.argv)
    for widths in ((values.width, values.hidden), (values.hidden, values.width)):
        compare(values, *widths)


def compare(values: flags.FlagValues, width_in: int, width_out: int) -> None:
    print(f"x [{values.tokens}, {width_in}] by [{width_in}, {width_out}], {values.layout}, block {values.block}")
    sides = {"machine": machine(), "dense": dense(values.tokens, width_in, width_out)}
    densities = {}
    for density in DENSITIES:
        name, chosen = f"1/{round(1 / density)}", choice(values.layout, density=density, block=values.block)
        try:
            made = build_layout(chosen, width_in, width_out, "layout")
        except UserError as error:
            print(f"  {name:>5}: {error}")
            continue
        densities[name] = made.num_blocks / (made.shape[0] * made.shape[1])
        sides[name] = sparse(values.tokens, made)
    times = alternate(sides, values.rounds)
    flops = 6 * values.tokens * width_in * width_out
    for name, density in {"dense": 1.0, **densities}.items():
        over = np.median(times[name] / times["dense"]) / density
        print(
            f"  {name:>5}: time / dense {ratio(times, name, 'dense')}, over density {over:.2f}, "
            f"{share(times, name, density * flops)} of the rate of a square product"
        )


def dense(tokens: int, width_in: int, width_out: int):
    return timed(lambda x, w: x @ w, (tokens, width_in), (width_in, width_out), width_out)


def sparse(tokens: int, made):
    product = lambda x, blocks: block_sparse_matmul(x, blocks, made)
    return timed(product, (tokens, made.width_in), (made.num_blocks, made.block, made.block), made.width_out)


def timed(product, shape_x, shape_w, width_out):
    """The product and its gradients by x and by the weights, compiled, of fixed random arrays."""
    x, w, gradient = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate((shape_x, shape_w, (shape_x[0], width_out)))
    )

    @jax.jit
    def run(x, w, gradient):
        y, backward = jax.vjp(product, x, w)
        return y, backward(gradient)

    return lambda: run(x, w, gradient)


if __name__ == "__main__":
    main()
