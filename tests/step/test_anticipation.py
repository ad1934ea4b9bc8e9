"""Choices made ahead: when, by which parameters, and how they outlive a restart."""

import functools
import math
import os
import random
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm import data, runs
from sparse_lm.config import Anticipation, identity_fields
from sparse_lm.errors import UserError
from sparse_lm.mesh import make_mesh, sharding
from sparse_lm.runs import replay
from sparse_lm.runs.folder import read_rows
from sparse_lm.step import anticipation
from sparse_lm.step.build import build
from sparse_lm.step.loss import packed_context
from tests import tiny

AHEAD, ON, SPIKE, STEPS = 2, 5, 3, 12  # the loss of step 3 is made to spike
MODELS = {
    "accumulated": {
        "model__experts": 4,
        "model__capacity_factor": 1.0,
        "model__router": tiny.switch(jitter=0.1, z_loss=0.001),
        "model__dropout": 0.1,
        "training__accumulation": 2,
    },
    "experts choose": {"model__experts": 4, "model__router": configs.choice("expert_choice")},
    "layers are skipped": {
        "model__experts": 1,
        "model__capacity_factor": 0.25,
        "model__router": configs.choice("mixture_of_depths"),
    },
}
FAST = {"model__expert_every": 1, "optimizer__learning_rate": 0.03, "optimizer__warmup_steps": 0}


def built(name, ahead=AHEAD, **fields):
    options = Anticipation(ahead=ahead, spike=1.0, steps=ON)
    return tiny.built(**MODELS[name], **FAST | fields, training__anticipation=options)


def batch(config, step, ahead=AHEAD):
    rows = lambda step: tiny.batch(config, step % 4)
    return rows(step) | ({"ahead": rows(step + ahead)} if ahead else {})


def on(program, state):
    """The state on the program's devices; a step compiles again for one that is elsewhere."""
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state))


def scaled(program, state, factor):
    norm = {"scale": state.parameters["norm"]["scale"] * factor}
    return on(program, state._replace(parameters=state.parameters | {"norm": norm}))


def switched_on(program, state):
    return on(program, state._replace(anticipation=state.anticipation._replace(left=np.int32(ON))))


@functools.cache
def trained(name):
    """[state before it, metrics, what it saw] of each step; the outputs of step 3 are scaled up, so that it fails."""
    program = built(name)
    state, steps = program.init(), []
    for step in range(STEPS):
        if step == SPIKE:
            state = scaled(program, state, 10.0)
        elif step == SPIKE + 1:
            state = scaled(program, state, 0.1)
        after, metrics, seen = program.record(state, batch(program.config, step))
        steps.append((state, jax.device_get(metrics), jax.device_get(seen)))
        state = after
    return steps


@functools.cache
def chooser(name):
    """A compiled forward pass of a part of a batch, with what its routers choose."""
    config, fns = built(name).config, built(name).functional

    def choose(parameters, router, rows, key):
        context = packed_context(rows, config.model.capacity_factor)
        return fns.apply(parameters, rows["inputs"], context, router, key).aux.chosen

    return jax.jit(choose)


def parts(config, step):
    """(rows, key) of each microbatch of a step, as the documentation of randomness and accumulation has it."""
    n = config.training.accumulation
    key = jax.random.fold_in(jax.random.split(jax.random.key(config.training.seed))[1], step)
    rows = tiny.batch(config, step % 4)
    return [({k: v[p::n] for k, v in rows.items()}, key) for p, key in enumerate(jax.random.split(key, n))]


def chosen(name, by, step):
    """What the parameters before step `by` choose for the batch of `step`."""
    state = trained(name)[by][0]
    of_parts = [
        chooser(name)(state.parameters, state.router, rows, key) for rows, key in parts(built(name).config, step)
    ]
    return np.stack(of_parts)


def test_by_default_there_is_nothing_of_it():
    for program in (built("accumulated", ahead=0), tiny.built(training__anticipation=Anticipation(ahead=2))):
        assert program.abstract_state.anticipation is None and "ahead" not in program.abstract_batch
        _, metrics = program.step.lower(program.abstract_state, program.abstract_batch).out_info
        assert "anticipating" not in metrics


@pytest.mark.parametrize("name", MODELS)
def test_it_is_on_after_the_spike_for_so_many_steps(name):
    on = [bool(metrics["anticipating"]) for _, metrics, _ in trained(name)]
    assert on == [SPIKE < step <= SPIKE + ON for step in range(STEPS)]


@pytest.mark.parametrize("name", MODELS)
def test_while_on_experts_are_chosen_by_the_parameters_of_some_steps_before(name):
    """But for the first steps of it, in which the queue fills."""
    changed = 0
    for step in range(STEPS):
        used = SPIKE + AHEAD < step <= SPIKE + ON
        found = trained(name)[step][2]["chosen"]
        np.testing.assert_array_equal(found, chosen(name, step - AHEAD if used else step, step))
        changed += used and (found != chosen(name, step, step)).any()
    assert changed  # some of these steps would choose otherwise by themselves


@pytest.mark.bit_for_bit
def test_all_but_the_choice_is_of_the_parameters_of_the_step():
    """It is the step, bit for bit, with choices given that the parameters of some steps before make, and no other."""
    name, step = "experts choose", SPIKE + AHEAD + 1
    program, (state, metrics, seen) = built(name), trained(name)[step]
    given = lambda by: program.record(state, batch(program.config, step), jnp.asarray(chosen(name, by, step)))
    after, *found = given(step - AHEAD)
    tiny.equal(found, [metrics, seen])
    tiny.equal(after, trained(name)[step + 1][0])
    assert not np.allclose(given(step)[1]["grad_norm"], metrics["grad_norm"], rtol=1e-3)


def test_parameters_that_stay_choose_ahead_what_they_would_choose():
    """With the same randomness, so that the step is what it is without any of it."""
    program = built("accumulated")
    begin = program.init()
    state = switched_on(program, begin)
    for step in range(AHEAD + 2):
        after, metrics, seen = program.record(state, batch(program.config, step))
        off = on(program, begin._replace(step=np.int32(step), tokens=state.tokens))
        _, expected, own = program.record(off, batch(program.config, step))
        assert metrics.pop("anticipating") and not expected.pop("anticipating")
        tiny.equal((metrics, seen), (expected, own))
        state = after._replace(parameters=begin.parameters, optimizer=begin.optimizer, router=begin.router)


def test_a_spike_is_a_loss_above_the_running_mean_or_not_finite():
    """Against a loop; with what the queue is for, and when it is computed."""
    losses = [5.0, 4.0, 4.5, 6.2, 3.0, math.nan, 4.0, 4.0, 4.0, 4.0, math.inf, 4.0]
    options = Anticipation(ahead=2, spike=1.0, steps=3)
    state = anticipation.init(2, jax.ShapeDtypeStruct((1, 1, 2, 4, 1), jnp.int32))
    choose = lambda step: lambda: jnp.full((1, 1, 2, 4, 1), step, jnp.int32)
    after = jax.jit(lambda state, step, loss: anticipation.update(state, options, step, loss, choose(step)))
    mean, left, made = None, 0, {}
    for step, value in enumerate(losses):
        found = anticipation.queued_choices(state, jnp.int32(step))
        used = left > 0 and step in made
        assert bool(found.on.all()) == bool(found.on.any()) == used
        if used:
            assert (found.indices == made[step]).all()
        if left:
            made[step + 2] = step
        spike = not math.isfinite(value) or (mean is not None and value > mean + 1.0)
        left = 3 if spike else max(left - 1, 0)
        if math.isfinite(value):
            mean = value if mean is None else 0.9 * mean + 0.1 * value
        state = after(state, step, value)
        assert int(state.left) == left and float(state.mean) == pytest.approx(mean, rel=1e-6)
    assert made == {6: 4, 7: 5, 8: 6, 9: 7, 10: 8, 13: 11}


def test_the_batch_of_some_steps_later_is_the_last_one_at_the_end():
    rows = [{"tokens": np.full(17, i), "segments": np.ones(16), "bytes": 1} for i in range(12)]
    config = built("experts choose").config
    batches, place = data.Batches(rows, 4, 16, 3), sharding(built("experts choose").mesh, "batch")
    for step, later in enumerate((2, 2, 2)):
        found = anticipation.step_batch(config, batches, step, place)
        tiny.equal(found.pop("ahead"), data.device_batch(batches, later, 4, place))
        tiny.equal(found, data.device_batch(batches, step, 4, place))
    plain = built("experts choose", ahead=0).config
    tiny.equal(anticipation.step_batch(plain, batches, 1, place), data.device_batch(batches, 1, 4, place))


@pytest.fixture
def text_config(tmp_path):
    """A config on random words with a learning rate so high that the loss rises."""
    (tmp_path / "text").mkdir()
    words, draw = "the cat sat on a mat and then went away to see what other cats do".split(), random.Random(0)
    for i in range(100):
        (tmp_path / f"text/{i}.txt").write_text(" ".join(draw.choices(words, k=60)))

    def make(**fields):
        made = tiny.config(
            **MODELS["experts choose"],
            model__vocabulary=300,
            model__expert_every=1,
            data__sources=(f"folder:{tmp_path}/text",),
            training__anticipation=Anticipation(ahead=2, spike=0.2, steps=4),
            evaluation__every=100,
            evaluation__rows=4,
            checkpoints__every=3,
            logging__every=1,
            logging__progress=False,
            optimizer__learning_rate=3.0,
            optimizer__schedule=configs.choice("constant"),
            **fields,
        )
        return configs.resolve(configs.from_dict(configs.to_dict(made) | {"cache": str(tmp_path / "cache")}))

    return make


@pytest.mark.bit_for_bit
def test_a_run_goes_on_within_it_and_its_steps_are_replayed(text_config, tmp_path):
    whole, parted = str(tmp_path / "whole"), str(tmp_path / "parted")
    runs.train(text_config(training__steps=12), whole)
    for steps in (8, 12):
        runs.train(text_config(training__steps=steps), parted)
    plain = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "data_wait")}
    rows = [plain(row) for row in read_rows(whole, "metrics")]
    assert [plain(row) for row in read_rows(parted, "metrics")] == rows
    assert [row["anticipating"] for row in rows[6:10]] == [1, 1, 1, 1]  # it stops and goes on in the middle of it
    replayed = replay.replay(whole, 9)  # from the checkpoint of step 6
    assert replayed.row == plain(replayed.logged)
    assert runs.evaluate(whole)["step"] == 12


def test_accumulation_is_of_the_identity_where_choices_are_kept_by_microbatch():
    parts = lambda n, ahead: identity_fields(
        tiny.config(training__accumulation=n, training__anticipation=Anticipation(ahead=ahead))
    )
    assert parts(1, 0) == parts(2, 0) != parts(2, 3) != parts(1, 3)


@pytest.mark.parametrize(
    "options, router, words",
    [
        ({"ahead": 3}, "soft", "training.anticipation.ahead is 3; it must be 0 with the router 'soft'"),
        ({"ahead": -1}, "switch", "training.anticipation.ahead is -1; it must be at least 0"),
        ({"spike": 0.0}, "switch", "training.anticipation.spike is 0.0; it must be above 0"),
        ({"spike": math.nan}, "switch", "training.anticipation.spike is nan; it must be above 0"),
        ({"ahead": 4, "steps": 4}, "switch", "training.anticipation.steps is 4; it must be above .*ahead=4"),
    ],
)
def test_what_does_not_fit_is_refused(options, router, words):
    with pytest.raises(UserError, match=words):
        tiny.built(
            model__experts=4, model__router=configs.choice(router), training__anticipation=Anticipation(**options)
        )


def on_four_devices():
    """Run in a process with four devices: the steps of `trained` on a mesh, beside those on one device."""
    fields = MODELS["accumulated"] | FAST | {"training__accumulation": 1, "model__dropout": 0.0}
    config = tiny.config(**fields, training__anticipation=Anticipation(ahead=AHEAD, spike=1.0, steps=ON))
    found = []
    for mesh, devices in ((configs.Mesh(), 1), (configs.Mesh(data=1, fsdp=2, expert=2), 4)):
        program = build(config, make_mesh(mesh, jax.devices()[:devices]))
        state, losses = switched_on(program, program.init()), []
        rows = jax.tree.map(lambda leaf: leaf.sharding, program.abstract_batch)
        for step in range(6):
            state, metrics = program.step(state, jax.device_put(batch(config, step), rows))
            losses.append(float(metrics["loss"]))
        queue = state.anticipation.queue
        assert queue.sharding.shard_shape(queue.shape)[3] * devices == queue.shape[3]
        found.append((losses, jax.device_get(state.anticipation)))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-4)
    tiny.close(found[1][1], found[0][1])


def test_on_a_mesh_it_is_what_it_is_on_one_device():
    flags = {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    code = "from tests.step.test_anticipation import on_four_devices; on_four_devices()"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=os.environ | flags, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "nvoluntary full rematerialization" not in done.stderr, done.stderr
