"""From a config and a mesh to everything a run is made of: abstract state, step, evaluation, shardings.

The loop, the TPU compiler, tests and benchmarks all call `build`. Nothing is allocated before `init` is called.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm.cost.arrays import of_blocks
from sparse_lm.cost.routers import form, skips_layers
from sparse_lm.errors import UserError
from sparse_lm.kernels.block_sparse_tpu import check_tpu_block
from sparse_lm.mesh import check, sharding
from sparse_lm.models import Functional, functional
from sparse_lm.routing.health import health
from sparse_lm.training import anticipation
from sparse_lm.training.layout import names
from sparse_lm.training.loss import Batch, accumulate, choices, loss
from sparse_lm.training.optimizer import clipping, make_optimizer
from sparse_lm.training.schedules import schedule


class TrainState(NamedTuple):
    """All that a step changes, and the seed: randomness is a function of the seed and the step."""

    seed: jax.Array  # int32; an array, so that runs of other seeds share the compiled program
    step: jax.Array  # steps done, int32
    parameters: dict  # float32
    optimizer: Any
    router: dict
    tokens: jax.Array  # trained on so far, in two int32: millions, and the rest
    skipped: jax.Array  # steps skipped for a non-finite gradient, int32
    skipped_in_a_row: jax.Array
    anticipation: anticipation.Anticipation | None  # where choices of experts are made ahead


@dataclass(frozen=True, eq=False)
class Build:
    config: configs.Config
    mesh: Mesh
    functional: Functional
    abstract_state: TrainState  # of jax.ShapeDtypeStruct with shardings
    abstract_batch: dict[str, Any]  # of a step (`anticipation.step_batch`); an evaluation's has a microbatch's rows
    init: Callable[[], TrainState]  # the state of step 0, created sharded
    step: Callable[..., tuple[TrainState, dict]]  # (state, batch) -> (state, metrics); the state given is donated
    record: Callable[..., tuple[TrainState, dict, dict]]  # a step that also returns token losses and what routers chose
    evaluate: Callable[..., dict]  # (parameters, router state, batch) -> sums at both capacities


def build(config: configs.Config, mesh: Mesh) -> Build:
    """Raises `UserError` where the config does not fit the mesh or names something that does not exist."""
    check(config, mesh)
    if config.model.layout.name != "dense" and mesh.devices.flat[0].platform == "tpu":
        last = config.model.layers - 1
        block, widths = of_blocks(config.model, last)[0][1], (config.model.width, config.model.layer_width(last))
        check_tpu_block(block, widths, "model.layout.options.block")
    model, training = config.model, config.training
    if skips_layers(model) and model.group_size != config.data.length:
        raise UserError(
            f"model.group_size is {model.group_size}; the router 'mixture_of_depths' chooses among the "
            f"{config.data.length} tokens of a row, so it must be 0"
        )
    fns = functional(model)
    optimizer = make_optimizer(config, fns.axes)
    learning_rate = schedule(config)
    ahead = anticipation.steps_ahead(config)
    rows = (training.batch, config.data.length)
    field = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, "batch"))
    abstract_batch = {name: field(rows) for name in ("inputs", "targets", "segments", "positions")}
    abstract_batch["bytes"] = field(rows[:1])

    def randomness(seed: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], step)

    def choose(parameters: dict, router: dict, batch: Batch, key: jax.Array) -> jax.Array:
        return choices(parameters, fns, router, batch, model.capacity_factor, key, training.accumulation)

    def init(seed: jax.Array) -> TrainState:
        parameters = fns.init(jax.random.split(jax.random.key(seed))[0])
        router, zero = fns.init_router_state(), jnp.zeros((), jnp.int32)
        anticipated = None
        if ahead:
            shape = jax.eval_shape(choose, parameters, router, abstract_batch, randomness(seed, zero))
            anticipated = anticipation.start(ahead, shape)
        counts = (jnp.zeros(2, jnp.int32), zero, zero)
        return TrainState(seed, zero, parameters, optimizer.init(parameters), router, *counts, anticipated)

    def record(state: TrainState, batch: dict[str, Any], given=None) -> tuple[TrainState, dict, dict]:
        key = randomness(state.seed, state.step)
        if ahead:
            coming, batch = batch[anticipation.AHEAD], {k: v for k, v in batch.items() if k != anticipation.AHEAD}
            given = anticipation.given(state.anticipation, state.step) if given is None else given

        def part(batch, key, given):
            differentiate = jax.value_and_grad(loss, has_aux=True)
            (_, seen), gradient = differentiate(
                state.parameters, fns, state.router, batch, model.capacity_factor, key, given
            )
            return (gradient, seen.pop("sums")), seen

        (gradient, sums), seen = accumulate(part, batch, key, given, training.accumulation)
        tokens = jnp.maximum(sums["tokens"], 1)
        rate = learning_rate(state.step)
        statistics = sums.pop("statistics", {})
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradient) / tokens
            # Mean and clipping as one multiple, since each is a pass over the gradient.
            scale = clipping(norm, config.optimizer.clip_norm) / tokens
            gradient = jax.tree.map(lambda g: g * scale, gradient)
            updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
            after = (
                jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates),
                optimizer_state,
                fns.update_router_state(state.router, statistics),
            )
            # A step with a non-finite gradient changes nothing but the counts.
            finite = jnp.isfinite(norm)
            keep = lambda new, old: jnp.where(finite, new, old)
            parameters, optimizer_state, router = jax.tree.map(
                keep, after, (state.parameters, state.optimizer, state.router)
            )
        if ahead:
            later = lambda: choose(state.parameters, state.router, coming, randomness(state.seed, state.step + ahead))
            with jax.named_scope("anticipation"):
                anticipated = anticipation.after(
                    state.anticipation, training.anticipation, state.step, sums["cross_entropy"] / tokens, later
                )
        count = state.tokens + jnp.array([0, 1]) * sums["tokens"].astype(jnp.int32)
        new = TrainState(
            seed=state.seed,
            step=state.step + 1,
            parameters=parameters,
            optimizer=optimizer_state,
            router=router,
            tokens=jnp.stack([count[0] + count[1] // 10**6, count[1] % 10**6]),
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
            anticipation=anticipated if ahead else None,
        )
        per_token = {name: value / tokens for name, value in sums.items() if name not in ("tokens", "bytes")}
        metrics = {
            "loss": sum(per_token.values()),
            **per_token,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens": new.tokens,
            "skipped": new.skipped,
            "skipped_in_a_row": new.skipped_in_a_row,
            "routing": health(statistics) if statistics else {},
        }
        if ahead:
            metrics["anticipating"] = state.anticipation.left > 0
        return new, metrics, seen

    def evaluate(parameters: dict, router: dict, batch: Batch) -> dict:
        run = lambda factor: loss(parameters, fns, router, batch, factor, None)[1]["sums"]
        sums = run(model.eval_capacity_factor)
        # Where tokens do not choose, the router has its places from the training capacity throughout.
        same = not model.experts or form(model) != "token" or model.capacity_factor == model.eval_capacity_factor
        at_train_capacity = sums if same else run(model.capacity_factor)
        names = ("cross_entropy", "tokens", "bytes")
        return {n: sums[n] for n in names} | {"cross_entropy_train_capacity": at_train_capacity["cross_entropy"]}

    seed = np.int32(training.seed)
    abstract_state = _abstract_state(jax.eval_shape(init, seed), fns.axes, mesh)
    batches = jax.tree.map(lambda leaf: leaf.sharding, abstract_batch)
    step_batch = abstract_batch
    if ahead:
        step_batch = abstract_batch | {anticipation.AHEAD: abstract_batch}
        abstract_state = abstract_state._replace(anticipation=anticipation.lay_out(abstract_state.anticipation, mesh))
    states = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def compiled(function: Callable, **options) -> Callable:
        jitted = jax.jit(function, **options)
        call = _under(mesh, jitted)
        call.lower = _under(mesh, jitted.lower)
        return call

    step_options = dict(in_shardings=(states, jax.tree.map(lambda leaf: leaf.sharding, step_batch)), donate_argnums=0)
    return Build(
        config,
        mesh,
        fns,
        abstract_state,
        step_batch,
        init=functools.partial(compiled(init, out_shardings=states), seed),
        step=compiled(lambda s, b: record(s, b)[:2], out_shardings=(states, everywhere), **step_options),
        record=compiled(record, out_shardings=(states, everywhere, None)),
        evaluate=compiled(evaluate, in_shardings=(states.parameters, states.router, batches), out_shardings=everywhere),
    )


def _under(mesh: Mesh, function: Callable) -> Callable:
    """The function, called with the mesh in force."""

    def call(*args):
        with jax.set_mesh(mesh):
            return function(*args)

    return call


def _abstract_state(state: TrainState, axes: dict, mesh: Mesh) -> TrainState:
    """The state with shardings: each parameter by its axes, each array of the optimizer by those of its parameter."""
    named = {
        names(path): value for path, value in jax.tree.leaves_with_path(axes, is_leaf=lambda a: isinstance(a, tuple))
    }
    shapes = {names(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(state.parameters)}

    def place(path, leaf):
        keys = names(path)
        for start in range(len(keys)):
            for stop in range(len(keys), start, -1):
                if (parameter := keys[start:stop]) in named:
                    fitting = _matching_axes(leaf.shape, shapes[parameter], named[parameter])
                    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding(mesh, *fitting))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map_with_path(place, state)


def _matching_axes(shape: tuple, of: tuple, axes: tuple[str, ...]) -> list[str | None]:
    """The axes of an array whose shape is a subsequence of its parameter's (a factored moment lacks a dimension)."""
    left = list(zip(of, axes))
    found = []
    for size in shape:
        while left and left[0][0] != size:
            left.pop(0)
        found.append(left.pop(0)[1] if left else None)
    return found


def count_tokens(tokens: np.ndarray) -> int:
    """The number that the two int32 of `TrainState.tokens` stand for."""
    return int(tokens[0]) * 10**6 + int(tokens[1])
