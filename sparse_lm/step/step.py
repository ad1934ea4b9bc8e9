"""One training step and one evaluation, as plain functions of a recipe, a state and a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Num

from sparse_lm import config as configs
from sparse_lm.models import Functional
from sparse_lm.routing import TokenChoice, router_of
from sparse_lm.routing.health import health
from sparse_lm.step import anticipation
from sparse_lm.step.loss import Batch, accumulate, choose_experts, loss
from sparse_lm.step.optimizer import clipping, make_optimizer
from sparse_lm.step.schedules import schedule
from sparse_lm.step.state import TrainState, add_tokens


class Recipe(NamedTuple):
    """What stays the same from step to step."""

    config: configs.Config
    functional: Functional
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    ahead: int  # steps that choices of experts are made ahead; 0: none


def make_recipe(config: configs.Config, functional: Functional) -> Recipe:
    """Raises `UserError` for an optimizer, schedule or option that does not exist or does not fit."""
    optimizer = make_optimizer(config, functional.axes)
    return Recipe(config, functional, optimizer, schedule(config), anticipation.steps_ahead(config))


def randomness(seed: jax.Array, step: jax.Array) -> jax.Array:
    """The key of a step."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], step)


def init_state(recipe: Recipe, seed: jax.Array, batch: dict[str, jax.ShapeDtypeStruct]) -> TrainState:
    """The state of step 0. batch: of a step, which the shapes of choices made ahead depend on."""
    fns, zero = recipe.functional, jnp.zeros((), jnp.int32)
    parameters, router = fns.init(jax.random.split(jax.random.key(seed))[0]), fns.init_router_state()
    anticipated = None
    if recipe.ahead:
        choose = lambda *args: choose_ahead(recipe, *args)
        anticipated = anticipation.init(
            recipe.ahead, jax.eval_shape(choose, parameters, router, batch, randomness(seed, zero))
        )
    return TrainState(
        seed=seed,
        step=zero,
        parameters=parameters,
        optimizer=recipe.optimizer.init(parameters),
        router=router,
        tokens=jnp.zeros(2, jnp.int32),
        skipped=zero,
        skipped_in_a_row=zero,
        anticipation=anticipated,
    )


def train_step(
    recipe: Recipe, state: TrainState, batch: dict[str, Any], replay: Any = None
) -> tuple[TrainState, dict, dict]:
    """One step: gradient, optimizer, router state, counters. A non-finite gradient changes nothing but the counters.

    Args:
        state: before the step.
        batch: `Batch`, and under `anticipation.AHEAD` a later one where choices are made ahead.
        replay: what routers chose in an earlier pass, by microbatch and routed layer, to take instead.

    Returns the next state, metrics, and what was seen on the way: `token_losses` and `chosen`, by microbatch.
    """
    key = randomness(state.seed, state.step)
    if recipe.ahead:
        coming, batch = batch[anticipation.AHEAD], {k: v for k, v in batch.items() if k != anticipation.AHEAD}
        replay = anticipation.queued_choices(state.anticipation, state.step) if replay is None else replay
    gradient, sums, seen = compute_gradient(recipe, state, batch, key, replay)
    statistics, tokens = sums.pop("statistics", {}), jnp.maximum(sums["tokens"], 1)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(gradient) / tokens
        parameters, optimizer, router = apply_gradient(recipe, state, gradient, statistics, norm, tokens)
    anticipated = None
    if recipe.ahead:
        anticipated = anticipate(recipe, state, coming, sums["cross_entropy"] / tokens)
    finite = jnp.isfinite(norm)
    new = TrainState(
        seed=state.seed,
        step=state.step + 1,
        parameters=parameters,
        optimizer=optimizer,
        router=router,
        tokens=add_tokens(state.tokens, sums["tokens"]),
        skipped=state.skipped + ~finite,
        skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        anticipation=anticipated,
    )
    per_token = {name: value / tokens for name, value in sums.items() if name not in ("tokens", "bytes")}
    metrics = {
        "loss": sum(per_token.values()),
        **per_token,
        "grad_norm": norm,
        "learning_rate": recipe.learning_rate(state.step),
        "tokens": new.tokens,
        "skipped": new.skipped,
        "skipped_in_a_row": new.skipped_in_a_row,
        "routing": health(statistics) if statistics else {},
    }
    if recipe.ahead:
        metrics["anticipating"] = state.anticipation.left > 0
    return new, metrics, seen


def compute_gradient(
    recipe: Recipe, state: TrainState, batch: Batch, key: jax.Array, replay: Any
) -> tuple[dict, dict[str, Any], dict[str, Any]]:
    """The gradient of the summed loss of a batch, the sums that `loss` gives, and what it saw by microbatch."""
    config = recipe.config
    differentiate = jax.value_and_grad(loss, has_aux=True)

    def part(batch, key, replay):
        (_, seen), gradient = differentiate(
            state.parameters, recipe.functional, state.router, batch, config.model.capacity_factor, key, replay
        )
        return (gradient, seen.pop("sums")), seen

    (gradient, sums), seen = accumulate(part, batch, key, replay, config.training.accumulation)
    return gradient, sums, seen


def apply_gradient(
    recipe: Recipe,
    state: TrainState,
    gradient: dict,
    statistics: dict,
    norm: Float[Array, ""],
    tokens: Float[Array, ""],
) -> tuple[dict, Any, dict]:
    """Parameters, optimizer and router state after a step; as they were where the gradient is not finite.

    gradient: of the loss summed over `tokens` tokens; norm: that of their mean.
    """
    # Mean and clipping as one multiple, since each is a pass over the gradient.
    scale = clipping(norm, recipe.config.optimizer.clip_norm) / tokens
    gradient = jax.tree.map(lambda g: g * scale, gradient)
    updates, optimizer = recipe.optimizer.update(gradient, state.optimizer, state.parameters)
    rate = recipe.learning_rate(state.step)
    after = (
        jax.tree.map(lambda p, u: p - rate * u, state.parameters, updates),
        optimizer,
        recipe.functional.update_router_state(state.router, statistics),
    )
    before = (state.parameters, state.optimizer, state.router)
    finite = jnp.isfinite(norm)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def choose_ahead(recipe: Recipe, parameters: dict, router: dict, batch: Batch, key: jax.Array) -> jax.Array:
    """What routers would choose for a batch with these parameters, by microbatch and routed layer."""
    factor, parts = recipe.config.model.capacity_factor, recipe.config.training.accumulation
    return choose_experts(parameters, recipe.functional, router, batch, factor, key, parts)


def anticipate(
    recipe: Recipe, state: TrainState, coming: Batch, cross_entropy: Float[Array, ""]
) -> anticipation.Anticipation:
    """The anticipation after a step of this mean cross-entropy; coming: the batch of `ahead` steps later."""
    key = lambda: randomness(state.seed, state.step + recipe.ahead)
    later = lambda: choose_ahead(recipe, state.parameters, state.router, coming, key())
    with jax.named_scope("anticipation"):
        options = recipe.config.training.anticipation
        return anticipation.update(state.anticipation, options, state.step, cross_entropy, later)


def evaluate_batch(recipe: Recipe, parameters: dict, router: dict, batch: Batch) -> dict[str, Num[Array, " B"]]:
    """Sums over each row: cross_entropy at the evaluation's capacity and at the training's, tokens, bytes."""
    model = recipe.config.model
    run = lambda factor: loss(parameters, recipe.functional, router, batch, factor, None)[1]["token_losses"].sum(1)
    losses = run(model.eval_capacity_factor)
    # Where tokens do not choose, the router has its places from the training capacity throughout.
    places_differ = model.experts > 0 and router_of(model).form is TokenChoice
    differ = places_differ and model.capacity_factor != model.eval_capacity_factor
    return {
        "cross_entropy": losses,
        "cross_entropy_train_capacity": run(model.capacity_factor) if differ else losses,
        "tokens": (batch["segments"] > 0).sum(1),
        "bytes": batch["bytes"],
    }
