"""What the architecture page says under "How to add": one file and one table entry make a router, a kind of attention
or of feed-forward layer that trains, counts, checkpoints, partitions, generates and has a dense twin."""

import json
import math
import os
import pathlib
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm import cost, runs
from sparse_lm.models import functional
from sparse_lm.runs.folder import read_rows
from sparse_lm.scaling.compare import compare
from sparse_lm.serving.generate import cached_logits
from sparse_lm.step.loss import packed_context
from tests import tiny
from tests.added.table import ADDED, FIELDS
from tests.cost.dots import dot_flops, gradient_program

every = pytest.mark.parametrize("name", FIELDS)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    for table, name, kind, _ in ADDED.values():
        monkeypatch.setitem(table, name, kind)


@every
def test_it_learns(name):
    program, losses = tiny.built(**FIELDS[name], optimizer__learning_rate=0.02), []
    state, batch = program.init(), tiny.batch(program.config)
    before = jax.device_get(state.router)
    for _ in range(25):
        state, metrics = program.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), before, jax.device_get(state.router))
    assert all(jax.tree.leaves(changed)) and bool(changed) == (name == "router")


@every
def test_it_is_counted(name):
    config = tiny.config(**FIELDS[name], model__scan=False, model__executor="einsum")
    leaves = jax.tree.leaves(jax.eval_shape(functional(config.model).init, jax.random.key(0)))
    assert cost.count_parameters(config.model).total == sum(leaf.size for leaf in leaves)
    parts = cost.count_flops(config.model, config.data.length).parts
    counted = sum(part.training for part in parts if part.name != "elementwise")
    tokens = config.training.batch * config.data.length
    assert dot_flops(gradient_program(config)) / tokens == pytest.approx(counted, rel=1e-5)
    assert cost.info_table(config).count("\n") > 15


@every
def test_it_has_a_twin_of_equal_flops(name):
    config = tiny.config(**FIELDS[name])
    twin = cost.dense_twin(config)
    sparse, dense = (cost.count_flops(c.model, c.data.length) for c in (config, twin))
    unit = 3 * 2 * 2 * config.model.width  # of hidden width; widths are whole numbers
    assert abs(sparse.training - sparse.router - dense.training) <= unit / 2
    assert not twin.model.sparse and twin.model.attention == config.model.attention


@every
def test_a_cache_gives_what_the_whole_pass_gives(name):
    model = tiny.config(**FIELDS[name], model__group_size=1).model
    fns, length = functional(model), 16
    parameters, state = fns.init(jax.random.key(0)), fns.init_router_state()
    ids = np.random.default_rng(0).integers(1, 64, (2, length)).astype(np.int32)
    ones, at = np.ones_like(ids), np.tile(np.arange(length, dtype=np.int32), (2, 1))
    batch = {name: jnp.asarray(rows) for name, rows in (("inputs", ids), ("segments", ones), ("positions", at))}
    whole = jax.jit(lambda: fns.apply(parameters, batch["inputs"], packed_context(batch, math.inf), state).logits)()
    step = jax.jit(lambda *args: cached_logits(fns, parameters, state, *args))
    caches, found = fns.init_caches(2, length), []
    for start in range(length):
        pair = lambda number: jnp.full(2, number, jnp.int32)
        logits, caches = step(caches, ids[:, start : start + 1], pair(start), pair(1))
        found.append(logits)
    tiny.close(np.concatenate(found, axis=1), np.asarray(whole))


@every
def test_a_run_with_it_is_compared_with_its_twin_and_goes_on(name, tmp_path):
    (tmp_path / "text").mkdir()
    draw, words = random.Random(0), "the cat sat on a mat and then went away to see what other cats do".split()
    for i in range(100):
        (tmp_path / f"text/{i}.txt").write_text(" ".join(draw.choices(words, k=40)))
    config = tiny.config(
        **FIELDS[name],
        model__vocabulary=272,
        training__steps=4,
        optimizer__warmup_steps=1,
        evaluation__rows=8,
        logging__every=1,
        logging__progress=False,
        data__sources=(f"folder:{tmp_path}/text",),
    )
    config = configs.resolve(configs.from_dict(configs.to_dict(config) | {"cache": f"{tmp_path}/cache", "name": "a"}))
    result = compare(config, runs.train, f"{tmp_path}/runs")
    assert result["verdict"] and result["sides"] == ["dense", "sparse"]
    longer = configs.to_dict(config)
    longer["training"]["steps"] = 6
    runs.train(configs.resolve(configs.from_dict(longer)), f"{tmp_path}/runs/sparse-seed0")
    assert [row["step"] for row in read_rows(f"{tmp_path}/runs/sparse-seed0", "metrics")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def eight():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.added.on_eight_devices"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@every
def test_eight_devices_divide_it_and_make_the_same_losses(name, eight):
    one, divided = eight[f"{name}, one"], eight[f"{name}, eight"]
    np.testing.assert_allclose(divided["losses"], one["losses"], rtol=1e-5)
    assert divided["held"] < 0.5
