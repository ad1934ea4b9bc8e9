"""Timing things against each other: in turns, many short rounds, ratios with their quartiles.

A shared machine's speed swings by a factor of several within minutes, so that a time by itself says little.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SIDE = 1024  # of the matrices in `machine`

Times = dict[str, np.ndarray]  # seconds of every round, by name


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> Times:
    """Calls each function once to compile, then all of them in turns; waits for what they return."""
    for run in runs.values():
        jax.block_until_ready(run())
    times = {name: np.zeros(rounds) for name in runs}
    for i in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name][i] = time.perf_counter() - start
    return times


def ratio(times: Times, a: str, b: str) -> str:
    """The median of a's seconds over b's, and its quartiles."""
    low, middle, high = np.quantile(times[a] / times[b], [0.25, 0.5, 0.75])
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def machine() -> Callable[[], jax.Array]:
    """A product of two square matrices of `SIDE` in float32, what the machine can do at its best."""
    x = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    return lambda: product(x)


def share(times: Times, name: str, flops: float) -> str:
    """FLOP/s that a run of so many FLOPs reached, over what `machine`, timed in the same turns, reached."""
    return f"{np.median(flops / times[name] / (2 * SIDE**3 / times['machine'])):.0%}"
