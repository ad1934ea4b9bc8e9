"""Block-sparse products against a loop over the blocks in float64."""

import functools
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparse_lm.errors import UserError
from sparse_lm.kernels import block_sparse_tpu
from sparse_lm.kernels.block_sparse import (
    MAX_LOOPS,
    block_sparse_matmul,
    gathered_gradients,
    gathered_matmul,
    reference_matmul,
)
from sparse_lm.layouts import Layout, layout_from_mask

BLOCK = 8


def holes() -> np.ndarray:
    """Rows and columns of many different counts, some of them 0."""
    mask = np.random.default_rng(0).random((9, 7)) < np.linspace(0.1, 1, 9)[:, None]
    mask[[2, 8]], mask[:, [0, 4]] = False, False
    return mask


def one_block() -> np.ndarray:
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = True
    return mask


MASKS = {
    "holes": holes(),
    "one block": one_block(),
    "all blocks": np.ones((2, 5), bool),
    "diagonal": np.eye(4, dtype=bool),
    "triangle": np.tril(np.ones((6, 6), bool)),
}


def drawn(layout: Layout, tokens: int, dtype: str) -> list[jax.Array]:
    """Random x, blocks and gradient of the result."""
    b = layout.block
    shapes = ((tokens, layout.width_in), (layout.num_blocks, b, b), (tokens, layout.width_out))
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def looped(layout: Layout, x, blocks, gradient) -> list[np.ndarray]:
    """The result and the gradients by x and blocks, one block after another."""
    x, blocks, gradient = (np.array(a, np.float64) for a in (x, blocks, gradient))
    y, dx, d_blocks = np.zeros(gradient.shape), np.zeros(x.shape), []
    for row, column, block in zip(layout.rows, layout.columns, blocks):
        into, out = (slice(i * layout.block, (i + 1) * layout.block) for i in (row, column))
        y[:, out] += x[:, into] @ block
        dx[:, into] += gradient[:, out] @ block.T
        d_blocks.append(x[:, into].T @ gradient[:, out])
    return [y, dx, np.array(d_blocks)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def by_vjp(product, layout, x, blocks, gradient):
    y, backward = jax.vjp(lambda x, blocks: product(x, blocks, layout), x, blocks)
    return [y, *backward(gradient)]


@functools.partial(jax.jit, static_argnums=0)
def by_pallas(layout, x, blocks, gradient):
    y = block_sparse_tpu.matmul(x, blocks, layout, interpret=True)
    return [y, *block_sparse_tpu.gradients(x, blocks, gradient, layout, interpret=True)]


WAYS = {
    "matmul": functools.partial(by_vjp, block_sparse_matmul),
    "reference": functools.partial(by_vjp, reference_matmul),
    "pallas": by_pallas,
}


def agree(found, expected, dtype: str) -> None:
    """To the rounding of the dtype, of the result alone: sums are in float32."""
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.dtype == dtype
        actual, largest = np.array(actual, np.float64), np.abs(wanted).max() + 1e-30
        np.testing.assert_allclose(actual, wanted, rtol=2**-8 if dtype == "bfloat16" else 0, atol=2e-6 * largest)


@pytest.mark.parametrize("mask, dtype", [*((mask, "float32") for mask in MASKS), ("holes", "bfloat16")])
@pytest.mark.parametrize("way", WAYS)
def test_result_and_gradients(way, mask, dtype):
    layout = layout_from_mask(MASKS[mask], BLOCK)
    arrays = drawn(layout, 37, dtype)
    agree(WAYS[way](layout, *arrays), looped(layout, *arrays), dtype)


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_pallas_over_tiles_of_tokens(tokens, monkeypatch):
    """The last tile is partly past the end, where interpretation puts NaN."""
    monkeypatch.setattr(block_sparse_tpu, "TILE_TOKENS", 16)
    layout = layout_from_mask(MASKS["triangle"], BLOCK)
    arrays = drawn(layout, tokens, "float32")
    agree(by_pallas.__wrapped__(layout, *arrays), looped(layout, *arrays), "float32")


def test_few_loops_however_many_counts():
    """As many as there are counts of blocks up to MAX_LOOPS; above, lines are padded."""
    for mask, loops in (("all blocks", 1), ("diagonal", 1), ("triangle", MAX_LOOPS)):
        layout = layout_from_mask(MASKS[mask], BLOCK)
        x, blocks, gradient = drawn(layout, 4, "float32")
        scans = lambda function, *a: str(jax.make_jaxpr(functools.partial(function, layout=layout))(*a)).count("scan[")
        assert (scans(gathered_matmul, x, blocks), scans(gathered_gradients, x, blocks, gradient)) == (loops, loops)


def test_leading_axes_and_a_wider_parameter():
    """x may have any axes before the last; blocks are cast to its dtype, and their gradient comes back in their own."""
    layout = layout_from_mask(MASKS["holes"], BLOCK)
    x, blocks, gradient = drawn(layout, 12, "float32")
    lead = lambda a: a.reshape(2, 2, 3, -1).astype("bfloat16")
    y, dx, d_blocks = by_vjp(block_sparse_matmul, layout, lead(x), blocks, lead(gradient))
    assert (y.shape, y.dtype, dx.dtype, d_blocks.dtype) == ((2, 2, 3, 56), "bfloat16", "bfloat16", "float32")
    low = [a.astype("bfloat16") for a in (x, blocks, gradient)]
    np.testing.assert_allclose(np.float32(y.reshape(12, -1)), looped(layout, *low)[0], rtol=2**-8, atol=1e-5)


def test_a_shape_that_is_not_the_layouts_is_refused():
    layout = layout_from_mask(MASKS["diagonal"], BLOCK)
    x, blocks, _ = drawn(layout, 3, "float32")
    with pytest.raises(ValueError, match="the layout has"):
        block_sparse_matmul(x[:, 1:], blocks, layout)
    with pytest.raises(ValueError, match="the layout has"):
        block_sparse_matmul(x, blocks[1:], layout)


def pallas_calls(jaxpr) -> list:
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "pallas_call"]


@pytest.mark.parametrize("mask", MASKS)
def test_the_grids_visit_exactly_the_blocks_that_exist(mask):
    layout = layout_from_mask(MASKS[mask], BLOCK)
    x, blocks, gradient = drawn(layout, 37, "float32")
    for function, arrays in (
        (block_sparse_tpu.matmul, (x, blocks)),
        (functools.partial(block_sparse_tpu.matmul, transposed=True), (gradient, blocks)),
        (block_sparse_tpu.block_gradients, (x, gradient)),
    ):
        (call,) = pallas_calls(jax.make_jaxpr(functools.partial(function, layout=layout))(*arrays).jaxpr)
        assert np.prod(call.params["grid_mapping"].grid) == layout.num_blocks == MASKS[mask].sum()


def test_the_platform_decides_while_lowering():
    layout = layout_from_mask(np.eye(2, dtype=bool), 128)
    x, blocks, gradient = drawn(layout, 16, "bfloat16")
    traced = by_vjp.trace(block_sparse_matmul, layout, x, blocks, gradient)
    kernels = {p: traced.lower(lowering_platforms=(p,)).as_text().count("@tpu_custom_call") for p in ("cpu", "tpu")}
    assert kernels == {"cpu": 0, "tpu": 3}


def test_a_tpu_needs_blocks_of_whole_registers():
    block_sparse_tpu.check_tpu_block(256, (512, 2048), "block")
    for block, widths, fit in ((64, (512, 2048), 128), (200, (512, 2048), 256), (200, (640, 1920), 128)):
        with pytest.raises(UserError, match=f"model.layout.options.block is {block}; .* nearest is {fit}$"):
            block_sparse_tpu.check_tpu_block(block, widths, "model.layout.options.block")
    with pytest.raises(UserError, match="is 160; a TPU needs a multiple of 128 that divides 320 and 1280; there is no"):
        block_sparse_tpu.check_tpu_block(160, (320, 1280), "block")


ON_A_MESH = """
import jax, numpy as np
from sparse_lm import config as configs
from sparse_lm.kernels.block_sparse import block_sparse_matmul, reference_matmul
from sparse_lm.layouts import layout_from_mask
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.step.build import build
from tests import tiny
from tests.kernels.test_block_sparse import BLOCK, by_vjp, drawn, holes

layout = layout_from_mask(holes(), BLOCK)
x, blocks, gradient = drawn(layout, 24, "float32")
rows = lambda a: a.reshape(8, 3, -1)
mesh = make_mesh(configs.Mesh(data=2, fsdp=2, tensor=2))
with jax.set_mesh(mesh):
    batch = sharding(mesh, "batch")
    divided = [jax.device_put(a, s) for a, s in ((rows(x), batch), (blocks, sharding(mesh)), (rows(gradient), batch))]
    program = by_vjp.lower(block_sparse_matmul, layout, *divided).compile()
    found = program(*divided)
expected = by_vjp(reference_matmul, layout, rows(x), blocks, rows(gradient))
for actual, wanted in zip(found, expected):
    np.testing.assert_allclose(actual, wanted, atol=1e-5 * np.abs(wanted).max())
assert found[0].sharding.is_equivalent_to(batch, 3) and found[1].sharding.is_equivalent_to(batch, 3)
text = program.as_text()
assert "all-gather" not in text and text.count("all-reduce(") == 1

fields = dict(model__layout=configs.choice("small_world", density=0.5, block=4), training__batch=8)
losses = []
for sizes in (dict(data=1), dict(data=2, fsdp=2, tensor=2)):
    config = tiny.config(**fields, model__kv_heads=2)
    made = build(config, make_mesh(configs.Mesh(**sizes), jax.devices()[: 8 if len(sizes) > 1 else 1]))
    batch = tiny.batch(config, padding=(0, 3, 7, 1) * 2)
    batch = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, made.abstract_batch))
    state = made.init()
    for _ in range(2):
        state, metrics = made.step(state, batch)
    losses.append(float(metrics["loss"]))
np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
"""


def test_on_a_mesh_each_device_multiplies_its_own_rows():
    """One all-reduce, of the blocks' gradient; nothing else crosses devices."""
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-W", "error", "-c", ON_A_MESH]
    done = subprocess.run(command, cwd=root, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
