"""How long a run will take, before its first step."""

import time

import jax
import jax.numpy as jnp

from sparse_lm import config as configs
from sparse_lm.cost import step_flops

UTILISATION = 0.3  # of the speed of a large matrix product; small models reach less, large ones on a TPU more
SIDE = 1024


def seconds_per_step(config: configs.Config) -> float:
    """A rough estimate: the FLOPs that a step executes over a share of the speed at which these devices multiply."""
    speed = UTILISATION * jax.device_count() * _product_speed(config.model.dtype)
    return step_flops(config, jax.default_backend()) / speed


def _product_speed(dtype: str) -> float:
    """FLOP/s of one device of this process in a product of two square matrices."""
    multiply = jax.jit(jnp.matmul)
    matrix = jnp.ones((SIDE, SIDE), dtype)
    jax.block_until_ready(multiply(matrix, matrix))  # compiles
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(multiply(matrix, matrix))
        times.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(times)
