"""Grouped matrix multiplication against a loop over the experts in float64, on every way that a platform takes."""

import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.kernels import choose_alignment, grouped, grouped_cpu, grouped_matmul, grouped_outer, grouped_tpu

ROOT = pathlib.Path(__file__).parents[2]
TARGETS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
SIZES = {
    "uneven, some empty": [0, 37, 1, 0, 20, 5],
    "one has everything": [0, 0, 71, 0, 0, 0],
    "nobody has anything": [0, 0, 0, 0, 0, 0],
    "the last ends early": [3, 3, 3, 3, 3, 3],
}
matmul_cpu = functools.partial(grouped_cpu.matmul, aligned=1)
outer_cpu = functools.partial(grouped_cpu.outer, aligned=1)
matmul_tpu = functools.partial(grouped_tpu.matmul, interpret=True)
outer_tpu = functools.partial(grouped_tpu.outer, interpret=True)


def arrays(rows, sizes, width, columns, dtype="float32", seed=0):
    """x, weights, g and sizes; the rows of x and g that are no expert's hold NaN."""
    generator = np.random.default_rng(seed)
    used = np.arange(rows)[:, None] < sum(sizes)
    x, g = (np.where(used, generator.normal(size=(rows, n)), np.nan) for n in (width, columns))
    weights = generator.normal(size=(len(sizes), width, columns))
    return *(jnp.asarray(a, dtype) for a in (x, weights, g)), jnp.asarray(sizes)


def loop(x, weights, g, sizes):
    """y and the gradients by x and by the weights, in float64."""
    x, weights, g = (np.asarray(a, np.float64) for a in (x, weights, g))
    y, dx, dw = np.zeros_like(g), np.zeros_like(x), np.zeros_like(weights)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ weights[e], g[rows] @ weights[e].T, x[rows].T @ g[rows]
        start += size
    return y, dx, dw


def product_and_gradients(x, weights, g, sizes, aligned=1):
    y, backward = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes, aligned=aligned), x, weights)
    return y, *backward(g)


def agree(found, expected, dtype="float32"):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=TOLERANCE[dtype] * max(1, np.abs(b).max()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_and_gradients_agree_with_a_loop(sizes, dtype):
    given = arrays(71, sizes, 13, 9, dtype)
    agree(jax.jit(product_and_gradients)(*given), loop(*given), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    "matmul, outer", [(matmul_tpu, outer_tpu), (grouped.ragged_matmul, grouped.ragged_outer)], ids=["tpu", "gpu"]
)
def test_the_ways_of_other_platforms_agree_with_a_loop(matmul, outer, sizes, dtype):
    x, weights, g, sizes = arrays(71, sizes, 13, 9, dtype)
    found = matmul(x, weights, sizes, transposed=False), matmul(g, weights, sizes, transposed=True), outer(x, g, sizes)
    agree(found, loop(x, weights, g, sizes), dtype)


def test_tpu_tiles_that_do_not_divide_the_shapes():
    x, weights, g, sizes = arrays(300, [130, 0, 90], 1100, 1030)
    assert grouped_tpu._choose_tiles(300, 3, 1100, 1030, jnp.float32) == (128, 512, 1024)
    found = (
        matmul_tpu(x, weights, sizes, transposed=False),
        matmul_tpu(g, weights, sizes, transposed=True),
        outer_tpu(x, g, sizes),
    )
    agree(found, loop(x, weights, g, sizes))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 25), min_size=4, max_size=4), st.integers(0, 2**31))
def test_any_sizes(blocks, seed):
    """Multiples of 4, from nothing to several of the longest chunk, 64."""
    sizes = [4 * b for b in blocks]
    given = arrays(4 * 100, sizes, 5, 6, seed=seed)
    agree(aligned_by_4(*given), loop(*given))


aligned_by_4 = jax.jit(functools.partial(product_and_gradients, aligned=4))


def test_an_expert_with_more_rows_than_the_longest_chunk():
    given = arrays(2304, [1700, 4, 0, 600], 3, 2)
    agree(jax.jit(functools.partial(product_and_gradients, aligned=4))(*given), loop(*given))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_reference_agrees_with_a_loop(dtype):
    x, weights, g, sizes = arrays(71, SIZES["uneven, some empty"], 13, 9, dtype)
    y, backward = jax.vjp(lambda x, weights: grouped.reference_matmul(x, weights, sizes), x, weights)
    agree((y, *backward(jnp.nan_to_num(g))), loop(x, weights, g, sizes), dtype)


def test_sums_are_kept_in_float32():
    """4,096 ones in bfloat16 would stop at 256."""
    ones = jnp.ones((4096, 8), jnp.bfloat16)
    sizes = jnp.array([4096])
    assert (grouped_outer(ones, ones, sizes, aligned=16) == 4096).all()
    assert (grouped_matmul(ones.T, ones[None], jnp.array([8])) == 4096).all()


def test_inside_a_scanned_and_rematerialised_layer():
    x, weights, g, sizes = arrays(40, [11, 0, 29], 6, 6)

    @jax.checkpoint
    def layer(x, weights):
        return grouped_matmul(x, weights, sizes), None

    def total(x, stacked):
        return (jax.lax.scan(layer, x, stacked)[0] * g).sum()

    dx, dw = jax.jit(jax.grad(total, argnums=(0, 1)))(x, jnp.stack([weights, 2 * weights]))
    middle, first_dx, _ = loop(x, weights, g, sizes)
    _, by_middle, second = loop(middle, 2 * weights, g, sizes)
    _, by_x, first = loop(x, weights, by_middle, sizes)
    agree((dx, dw[0], dw[1]), (by_x, first, second))


IN_A_MESH = """
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tests.kernels.test_grouped import arrays, agree, loop, product_and_gradients

mesh = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
parts = [arrays(16, sizes, 6, 4, seed=seed) for seed, sizes in enumerate(([5, 3], [0, 9], [16, 0], [1, 2]))]
x, g, sizes = (np.concatenate([part[i] for part in parts]) for i in (0, 2, 3))
weights = np.concatenate([parts[0][1], parts[1][1]])  # experts 0 and 1 on one half of the mesh, 2 and 3 on the other

def local(x, weights, g, sizes):
    y, dx, dw = product_and_gradients(x, weights, g, sizes)
    return y, dx, jax.lax.psum(dw, "data")

rows, experts = P(("expert", "data")), P("expert")
given, found = (rows, experts, rows, rows), (rows, rows, experts)
inside = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=found, check_vma=False)
to = lambda *specs: tuple(NamedSharding(mesh, spec) for spec in specs)
jitted = jax.jit(inside, in_shardings=to(*given), out_shardings=to(*found))
expected = [loop(x, weights[2 * (i // 2) :][:2], g, sizes) for i, (x, _, g, sizes) in enumerate(parts)]
y, dx, dw = zip(*expected)
dw = dw[0] + dw[1], dw[2] + dw[3]
agree(jitted(x, weights, g, sizes), map(np.concatenate, (y, dx, dw)))

auto = jax.jit(product_and_gradients, in_shardings=to(rows, experts, rows, P()), out_shardings=to(*found))
whole = arrays(64, [20, 0, 31, 4], 6, 4)
agree(auto(*whole), loop(*whole))
"""


def test_inside_shard_map_and_under_jit_with_shardings():
    flags = {"JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_MESH], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_platform_is_chosen_when_lowering():
    """On a CPU machine a program for a TPU has the kernels of one, and one for a GPU ragged products."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 128), (4, 128, 256), (256, 256))]
    traced = jax.jit(product_and_gradients).trace(*shapes, jax.ShapeDtypeStruct((4,), jnp.int32))
    count = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count("tpu_custom_call")
    assert (count("tpu"), count("cpu"), count("cuda")) == (3, 0, 0)


def test_the_alignment_adds_little():
    assert choose_alignment("tpu", 4096, 64) == choose_alignment("gpu", 4096, 64) == 1
    assert [choose_alignment("cpu", 4096, experts) for experts in (1, 8, 16, 32, 64, 4096)] == [64, 64, 32, 16, 8, 8]


def test_rows_that_are_not_aligned_are_refused():
    x, weights, _, sizes = arrays(30, [4, 8], 3, 2)
    with pytest.raises(ValueError, match="30 rows are not a multiple of aligned=4"):
        grouped_matmul(x, weights, sizes, aligned=4)


COMPILE = """
import sys, jax, jax.numpy as jnp
from jax.experimental import topologies
from sparse_lm.kernels import grouped_matmul

def both(x, weights, g, sizes):
    y, backward = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes), x, weights)
    return y, backward(g)

for target in sys.argv[1:]:
    device = topologies.get_topology_desc(platform="tpu", topology_name=target).devices[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for dtype in ("bfloat16", "float32"):
        for n, e, d, f in ((8192, 8, 4096, 14336), (8192, 8, 14336, 4096), (4096, 256, 128, 512), (1001, 5, 1100, 60)):
            shapes = ((n, d), (e, d, f), (n, f))
            made = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
            sizes = jax.ShapeDtypeStruct((e,), jnp.int32, sharding=sharding)
            lowered = jax.jit(both).lower(*made, sizes)
            lowered.compile()
            print(target, dtype, n, e, d, f, lowered.as_text().count("@tpu_custom_call"))
"""


@pytest.mark.slow
def test_the_tpu_compiler_takes_the_kernels(tpu_compiler):
    """Forward and both gradients, one kernel each."""
    kernels = [line.split()[-1] for line in tpu_compiler(COMPILE, *TARGETS).splitlines()]
    assert kernels == ["3"] * len(TARGETS) * 2 * 4
