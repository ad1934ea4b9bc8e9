"""From a config and a mesh to everything a run is made of: abstract state, step, evaluation, shardings.

The loop, the TPU compiler, tests and benchmarks all call `build`. Nothing is allocated before `init` is called.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparse_lm import config as configs
from sparse_lm.mesh import sharding
from sparse_lm.models import Functional, functional
from sparse_lm.step import anticipation
from sparse_lm.step.fit import check_fit
from sparse_lm.step.state import TrainState, with_shardings
from sparse_lm.step.step import evaluate_batch, init_state, make_recipe, train_step


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
    """The compiled functions of a run and the shapes that they take, of `step.step` and `step.state`.

    Raises `DoesNotFit` where the mesh does not divide the config's sizes, and `UserError` where the config names
    something that does not exist or does not fit together.
    """
    fns = functional(config.model)
    check_fit(config, mesh, fns, mesh.devices.flat[0].platform)
    recipe, seed = make_recipe(config, fns), np.int32(config.training.seed)
    batch = step_batch = _abstract_batch(config, mesh)
    init = functools.partial(init_state, recipe, batch=batch)
    state = with_shardings(jax.eval_shape(init, seed), fns, mesh)
    if recipe.ahead:
        step_batch = batch | {anticipation.AHEAD: batch}
        state = state._replace(anticipation=anticipation.with_sharding(state.anticipation, mesh))
    shardings = functools.partial(jax.tree.map, lambda leaf: leaf.sharding)
    states, everywhere = shardings(state), NamedSharding(mesh, PartitionSpec())
    record = functools.partial(train_step, recipe)
    compiled = functools.partial(_compiled, mesh)
    return Build(
        config,
        mesh,
        fns,
        abstract_state=state,
        abstract_batch=step_batch,
        init=functools.partial(compiled(init, out_shardings=states), seed),
        step=compiled(
            lambda state, batch: record(state, batch)[:2],
            in_shardings=(states, shardings(step_batch)),
            out_shardings=(states, everywhere),
            donate_argnums=0,
        ),
        record=compiled(record, out_shardings=(states, everywhere, None)),
        evaluate=compiled(
            functools.partial(evaluate_batch, recipe),
            in_shardings=(states.parameters, states.router, shardings(batch)),
            out_shardings=everywhere,
        ),
    )


def _abstract_batch(config: configs.Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows = (config.training.batch, config.data.length)
    field = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding(mesh, "batch"))
    return {name: field(rows) for name in ("inputs", "targets", "segments", "positions")} | {"bytes": field(rows[:1])}


def _compiled(mesh: Mesh, function: Callable, **options) -> Callable:
    """The function compiled, with the mesh in force when it is called or lowered."""
    jitted = jax.jit(function, **options)

    def under_mesh(method: Callable) -> Callable:
        def call(*args):
            with jax.set_mesh(mesh):
                return method(*args)

        return call

    call = under_mesh(jitted)
    call.lower = under_mesh(jitted.lower)
    return call
