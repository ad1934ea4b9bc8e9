"""Optimizers, with learning rate and weight decay for each group of parameters."""

import math
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sparse_lm import config as configs
from sparse_lm.parameter import Axes, is_hidden_matrix
from sparse_lm.ranges import Positive, Probability, Range, Size
from sparse_lm.registry import create

_is_axes = lambda value: isinstance(value, tuple)


def group_of(path: tuple) -> str:
    """The group of a parameter: embedding, router, experts or rest."""
    names = [getattr(key, "key", key) for key in path]
    if names[0] in ("embedding", "output"):
        return "embedding"
    return next((name for name in ("router", "experts") if name in names), "rest")


def per_matrix(make: Callable[[Axes], optax.GradientTransformation], axes: dict) -> optax.GradientTransformation:
    """Applies a transformation to each matrix by itself, mapped over the layers, experts or blocks stacked with it.

    make: from the axes of one matrix to its transformation. axes: those of each parameter.
    """

    def mapped(function: str, axes: Axes) -> Callable:
        stacked = [axis for axis in axes if axis in ("layers", "experts", "blocks")]
        call = getattr(make(axes[len(stacked) :]), function)
        for _ in stacked:
            call = jax.vmap(call)
        return call

    def init(parameters):
        return jax.tree.map(lambda a, p: mapped("init", a)(p), axes, parameters, is_leaf=_is_axes)

    def update(updates, state, parameters):
        leaves = jax.tree.map(
            lambda a, u, s, p: Pair(mapped("update", a)(u, s, p)), axes, updates, state, parameters, is_leaf=_is_axes
        )
        pick = lambda i: jax.tree.map(lambda pair: pair.values[i], leaves, is_leaf=lambda x: isinstance(x, Pair))
        return pick(0), pick(1)

    return optax.GradientTransformation(init, update)


class Pair:
    """An update and its state, as one leaf of a tree."""

    def __init__(self, values: tuple[Any, Any]):
        self.values = values


def adamw(
    axes: dict, *, b1: Probability = 0.9, b2: Probability = 0.95, eps: Positive = 1e-8
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101); the decay is added by `make`."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def adafactor(
    axes: dict,
    *,
    decay_rate: Annotated[float, Range(above=0, most=1)] = 0.8,
    clip: Positive = 1.0,
    parameter_scale: bool = True,
    smallest: Size = 128,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235): second moments factored into rows and columns where both
    have at least `smallest` entries, the update of each matrix clipped to a root mean square of `clip`, and with
    `parameter_scale` multiplied by that of the matrix itself, so that the learning rate is relative."""
    steps = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=smallest),
        optax.clip_by_block_rms(clip),
    ]
    if parameter_scale:
        steps.append(optax.scale_by_param_block_rms())
    return per_matrix(lambda _: optax.chain(*steps), axes)


def muon(
    axes: dict, *, beta: Probability = 0.95, rms: Positive = 0.2, b1: Probability = 0.9, b2: Probability = 0.95
) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the matrices of attention, feed-forward and experts; Adam for embedding, router and norms.

    The orthogonal update is scaled to a root mean square of `rms`, that of Adam's, so that one learning rate serves
    both (Liu et al. 2025, arXiv 2502.16982, equation 4).
    """

    def make(axes: Axes) -> optax.GradientTransformation:
        if not is_hidden_matrix(axes):
            return optax.scale_by_adam(b1=b1, b2=b2)
        inputs = (0,) if axes[0] == "width" else tuple(range(len(axes) - 1))
        outputs = tuple(i for i in range(len(axes)) if i not in inputs)

        def scale(update, _):
            sides = [math.prod(update.shape[i] for i in side) for side in (inputs, outputs)]
            return update * rms * max(sides) ** 0.5

        numbers = contrib.MuonDimensionNumbers(inputs, outputs)
        return optax.chain(contrib.scale_by_muon(beta=beta, weight_dimension_numbers=numbers), optax.stateless(scale))

    return per_matrix(make, axes)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": adamw,
    "adafactor": adafactor,
    "muon": muon,
}


def make_optimizer(config: configs.Config, axes: dict) -> optax.GradientTransformation:
    """The algorithm, weight decay and multiples of the learning rate by group. Norms are not decayed.

    The step itself clips, and applies the learning rate: it belongs to the run's step, which goes on where an
    optimizer's own count stands still, at a step that is skipped.

    axes: the axis names of each parameter. Raises `UserError` for an unknown name or option.
    """
    options = config.optimizer
    algorithm = create("optimizer.algorithm", OPTIMIZERS, options.algorithm, axes)

    def finish(updates, parameters):
        def one(path, axes, update, parameter):
            group = getattr(options, group_of(path))
            decay = 0.0 if axes[-1] == "norm" else options.weight_decay * group.weight_decay
            return group.learning_rate * (update + decay * parameter)

        return jax.tree.map_with_path(one, axes, updates, parameters, is_leaf=_is_axes)

    return optax.chain(algorithm, optax.stateless(finish))


def clipping(norm: jax.Array, longest: float) -> jax.Array:
    """What a gradient of this norm is multiplied by to be no longer than `longest`; 0: as long as it is."""
    return longest / jnp.maximum(norm, longest) if longest else jnp.ones(())
