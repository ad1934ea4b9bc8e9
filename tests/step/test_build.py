"""The step as a whole; on several devices in tests/test_mesh.py."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm.config import choice, compute_capacity
from sparse_lm.errors import UserError
from sparse_lm.mesh import AXES, make_mesh
from sparse_lm.models import functional
from sparse_lm.step.build import build
from sparse_lm.step.loss import loss
from sparse_lm.step.schedules import schedule
from sparse_lm.step.state import count_tokens
from tests import tiny

SPARSE = {"model__experts": 4, "model__capacity_factor": 1.0, "model__router": tiny.switch(z_loss=0.001)}
ONE = {"model__experts": 1, "model__capacity_factor": 1.0, "model__router": tiny.switch()}
INF = float("inf")


def copied(tree):
    """A copy, for a step that is given away its state."""
    return jax.tree.map(lambda x: jnp.array(x), tree)


def curve(build, state, steps, batches=4):
    data = [tiny.batch(build.config, seed) for seed in range(batches)]
    losses = []
    for step in range(steps):
        state, metrics = build.step(state, data[step % batches])
        losses.append(float(metrics["loss"]))
    return np.array(losses), state


def on(build, state):
    """The state on the build's devices; a step compiles again for one that is elsewhere."""
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, build.abstract_state))


def fresh(build, parameters):
    """The state of step 0 with these parameters: AdamW begins with zeros."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), build.abstract_state)
    return on(build, zeros._replace(parameters=copied(parameters)))


def with_scale(build, state, scale):
    return on(build, state._replace(parameters=state.parameters | {"norm": {"scale": scale}}))


@pytest.mark.parametrize(
    "fields",
    [
        {"model__executor": "gather"},
        {"model__executor": "einsum"},
        {"model__executor": "gather", "model__activation": "swiglu", "training__accumulation": 2},
    ],
    ids=["gather", "einsum", "gated and accumulated"],
)
def test_one_expert_trains_as_the_dense_model(fields):
    one = tiny.built(**ONE, **fields)
    fields = {k: v for k, v in fields.items() if k != "model__executor"}
    twin = tiny.built(**fields)
    parameters = one.init().parameters
    losses, last = curve(twin, fresh(twin, tiny.dense(parameters)), 50)
    found, found_last = curve(one, fresh(one, parameters), 50)
    assert losses[-1] < 0.85 * losses[0]
    # A sparse expert layer has its balance loss besides, which is α per token and layer and has no gradient.
    np.testing.assert_allclose(found - 0.01, losses, atol=1e-5)
    tiny.close(tiny.dense(found_last.parameters), last.parameters, 1e-4)


def test_one_expert_trains_as_the_dense_model_in_bfloat16():
    one, twin = tiny.built(**ONE, model__dtype="bfloat16"), tiny.built(model__dtype="bfloat16")
    parameters = tiny.built(**ONE, model__executor="gather").init().parameters
    losses, _ = curve(twin, fresh(twin, tiny.dense(parameters)), 50)
    found, _ = curve(one, fresh(one, parameters), 50)
    np.testing.assert_allclose(found - 0.01, losses, atol=0.03)


@pytest.mark.parametrize("fields, parts", [({}, (4,)), (SPARSE, (2, 4))], ids=["dense", "sparse"])
def test_accumulation_changes_no_gradient(fields, parts):
    """Rows have different amounts of padding, so that a mean over parts would not be the mean over tokens."""
    whole, *parts = (tiny.built(**fields, training__accumulation=n) for n in (1, *parts))
    batch = tiny.batch(whole.config)
    state = whole.init()
    after, metrics = whole.step(copied(state), batch)
    first_moment = lambda state: optax.tree.get(state.optimizer, "mu")
    for part in parts:
        other, found = part.step(copied(state), batch)
        tiny.close(found, metrics, 2e-6)
        tiny.close(first_moment(other), first_moment(after), 2e-6)


def test_metrics_are_the_means_over_the_tokens():
    build = tiny.built(**SPARSE)
    fns, batch = build.functional, jax.tree.map(jnp.asarray, tiny.batch(build.config))
    state = build.init()
    tokens = (np.asarray(batch["segments"]) > 0).sum()
    part = lambda p: loss(p, fns, {}, batch, 1.0, jax.random.key(0))
    (total, seen), gradient = jax.jit(jax.value_and_grad(part, has_aux=True))(state.parameters)
    _, metrics = build.step(copied(state), batch)
    metrics = jax.tree.map(np.asarray, metrics)
    assert metrics["loss"] == pytest.approx(float(total / tokens), rel=1e-6)
    assert metrics["loss"] == pytest.approx(metrics["cross_entropy"] + metrics["balance_loss"] + metrics["z_loss"])
    assert metrics["cross_entropy"] == pytest.approx(np.asarray(seen["token_losses"]).sum() / tokens, rel=1e-6)
    squares = [np.square(np.asarray(g, np.float64) / tokens).sum() for g in jax.tree.leaves(gradient)]
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum(squares)), rel=1e-5)
    assert metrics["learning_rate"] == pytest.approx(float(schedule(build.config)(0)))
    assert count_tokens(metrics["tokens"]) == tokens
    assert {figure.shape for figure in metrics["routing"].values()} == {(len(build.functional.stack.routed_layers),)}
    load = np.asarray(seen["sums"]["statistics"]["load"])[0]
    assert load.sum() == tokens
    assert metrics["routing"]["load_max"][0] == pytest.approx(load.max() / load.mean())
    rows = np.asarray(seen["chosen"])[0, ..., 0]  # one group a row
    places = compute_capacity(16, 4, 1, 1.0)
    lost = sum(max(0, (row == e).sum() - places) for row in rows for e in range(4))
    assert lost > 0
    assert metrics["routing"]["dropped"][0] == pytest.approx(lost / tokens)


@pytest.mark.parametrize("router", [tiny.switch(), choice("deepseek", bias_rate=0.1)], ids=["switch", "deepseek"])
def test_a_step_with_a_nonfinite_gradient_changes_nothing_but_the_counts(router):
    build = tiny.built(**SPARSE | {"model__router": router})
    batch = tiny.batch(build.config)
    state, _ = build.step(build.init(), batch)
    scale = np.asarray(state.parameters["norm"]["scale"])
    spoiled = with_scale(build, state, np.where(np.arange(16) == 0, np.nan, scale))
    for skipped in (1, 2):
        before = copied(spoiled)
        spoiled, metrics = build.step(spoiled, batch)
        assert not np.isfinite(metrics["grad_norm"])
        for part in ("parameters", "optimizer", "router"):
            tiny.equal(getattr(spoiled, part), getattr(before, part))
        assert (spoiled.step, spoiled.skipped, spoiled.skipped_in_a_row) == (1 + skipped, skipped, skipped)
    healed, metrics = build.step(with_scale(build, spoiled, scale), batch)
    assert (healed.step, healed.skipped, healed.skipped_in_a_row) == (4, 2, 0)
    assert metrics["skipped"] == 2


def test_the_learning_rate_reported_is_the_one_applied_also_after_a_skipped_step():
    """Adam's first update of an entry is 1 in size, and norms have no weight decay."""
    build = tiny.built(**SPARSE)
    batch = tiny.batch(build.config)
    state = build.init()
    scale = np.asarray(state.parameters["norm"]["scale"])
    skipped, _ = build.step(with_scale(build, state, np.nan * scale), batch)
    after, metrics = build.step(with_scale(build, skipped, scale), batch)
    changes = np.abs(after.parameters["norm"]["scale"] - scale)
    np.testing.assert_allclose(changes, metrics["learning_rate"], rtol=1e-3)
    assert metrics["learning_rate"] == pytest.approx(float(schedule(build.config)(1)))


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_gradients_are_clipped_to_a_global_norm(limit):
    """Adam's first update is blind to the size of a gradient g but for its epsilon: with 1 it is g / (|g| + 1)."""
    optimizer = {"algorithm": choice("adamw", eps=1.0), "weight_decay": 0.0, "warmup_steps": 0, "learning_rate": 1.0}
    fields = {f"optimizer__{k}": v for k, v in (optimizer | {"schedule": choice("constant")}).items()}
    updates, norms = [], []
    for clip in (0.0, limit):
        build = tiny.built(**SPARSE | fields, optimizer__clip_norm=clip)
        before = build.init().parameters
        after, metrics = build.step(build.init(), tiny.batch(build.config))
        change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, before, after.parameters)
        updates.append(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(change)]))
        norms.append(float(metrics["grad_norm"]))
    gradient = updates[0] / (1 - np.abs(updates[0]))
    norm = np.sqrt((gradient**2).sum())
    np.testing.assert_allclose(norms, norm, rtol=1e-3)
    clipped = gradient * min(1.0, limit / norm)
    np.testing.assert_allclose(updates[1], clipped / (np.abs(clipped) + 1), rtol=0.01, atol=3e-7)


@pytest.fixture(scope="module")
def recorded():
    """With everything random that there is, and two microbatches."""
    router = tiny.switch(jitter=0.1, z_loss=0.001)
    fields = {"model__router": router, "model__dropout": 0.1, "model__expert_dropout": 0.1, "training__accumulation": 2}
    build = tiny.built(**SPARSE | fields)
    state, batch = fresh(build, tiny.built(**SPARSE).init().parameters), tiny.batch(build.config)
    return build, state, batch, build.record(copied(state), batch)


@pytest.mark.bit_for_bit
def test_a_recorded_step_is_the_step(recorded):
    build, state, batch, (after, metrics, seen) = recorded
    stepped, same_metrics = build.step(copied(state), batch)
    tiny.equal(metrics, same_metrics)
    tiny.equal(after, stepped)
    rows = np.asarray(batch["segments"]).reshape(2, 2, 16).swapaxes(0, 1)  # row r is in part r mod 2
    assert seen["chosen"].shape == (2, 1, 2, 16, 1)
    np.testing.assert_array_equal(np.asarray(seen["chosen"])[:, 0, ..., 0] >= 0, rows > 0)
    assert seen["token_losses"].sum() == pytest.approx(float(metrics["cross_entropy"]) * (rows > 0).sum(), rel=1e-6)


def test_a_step_given_its_own_experts_is_the_same_step(recorded):
    build, state, batch, (after, metrics, seen) = recorded
    replayed, again, seen_again = build.record(copied(state), batch, seen["chosen"])
    tiny.equal(again, metrics)
    tiny.equal(replayed, after)
    tiny.equal(seen_again, seen)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_each_microbatch_drops_units_of_its_own(rate):
    build = tiny.built(model__dropout=rate, training__accumulation=2)
    # Row r is in microbatch r mod 2, so that both have the same rows.
    batch = jax.tree.map(lambda rows: np.repeat(rows[::2], 2, axis=0), tiny.batch(build.config))
    first, second = build.record(build.init(), batch)[2]["token_losses"]
    assert np.array_equal(first, second) == (rate == 0)


def test_randomness_is_of_the_seed_and_the_step(recorded):
    build, state, batch, (_, metrics, _) = recorded
    _, later = build.step(copied(state)._replace(step=state.step + 1), batch)
    assert later["cross_entropy"] != metrics["cross_entropy"]


def test_evaluation_sums_losses_at_both_capacities_without_jitter_and_dropout():
    fields = SPARSE | {"model__router": tiny.switch(jitter=0.1), "model__dropout": 0.1}
    build = tiny.built(**fields, model__eval_capacity_factor=INF)
    batch = tiny.batch(build.config)
    state = fresh(build, tiny.built(**SPARSE).init().parameters)
    found = build.evaluate(state.parameters, state.router, batch)
    part = jax.jit(lambda p, b, factor: loss(p, build.functional, {}, b, factor, None)[1]["sums"], static_argnums=2)
    batch = jax.tree.map(jnp.asarray, batch)
    free, tight = part(state.parameters, batch, INF), part(state.parameters, batch, 1.0)
    assert free["statistics"]["dropped"].sum() == 0 < tight["statistics"]["dropped"].sum()
    assert found["cross_entropy"].sum() == pytest.approx(float(free["cross_entropy"]), rel=1e-6)
    assert found["cross_entropy_train_capacity"].sum() == pytest.approx(float(tight["cross_entropy"]), rel=1e-6)
    assert (found["tokens"] == (np.asarray(batch["segments"]) > 0).sum(axis=1)).all()
    assert (found["bytes"] == np.asarray(batch["bytes"])).all()
    swapped = jax.tree.map(lambda x: x[::-1], batch)  # dropless, a row's loss is its own
    other = build.evaluate(state.parameters, state.router, swapped)["cross_entropy"][::-1]
    np.testing.assert_allclose(other, found["cross_entropy"], rtol=1e-5)


def test_tokens_are_counted_beyond_32_bits():
    build = tiny.built(**SPARSE)
    state = on(build, build.init()._replace(tokens=np.array([5000, 999_990], np.int32)))
    state, metrics = build.step(state, tiny.batch(build.config))
    assert count_tokens(np.asarray(state.tokens)) == 5_000_999_990 + (4 * 16 - 11)


def test_a_large_model_is_described_without_an_array():
    config = tiny.config(model__experts=2048, model__width=2048, model__ffn_width=8192, model__layers=30)
    shapes = jax.eval_shape(functional(config.model).init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 1e12


def test_a_block_that_a_tpu_cannot_tile():
    config = tiny.config(model__ffn_width=64, model__layout=choice("banded", block=8, density=0.5))
    mesh = mock.Mock(
        jax.sharding.Mesh, shape=dict.fromkeys(AXES, 1), devices=np.array([[[[mock.Mock(platform="tpu")]]]])
    )
    with pytest.raises(UserError) as raised:
        build(config, mesh)
    answer = "model.layout.options.block is 8; a TPU needs a multiple of 128 that divides 16 and 64; there is none"
    assert str(raised.value) == answer
    build(config, make_mesh(config.mesh, jax.devices()[:1]))  # a CPU can
