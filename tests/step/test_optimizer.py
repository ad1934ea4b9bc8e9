"""Each algorithm against itself applied to one matrix at a time, and against formulas by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparse_lm import config as configs
from sparse_lm.config import choice
from sparse_lm.errors import UserError
from sparse_lm.models import functional
from sparse_lm.step.optimizer import OPTIMIZERS, group_of, make_optimizer
from tests import tiny

STEPS = 3
FIELDS = {"model__experts": 3, "model__layers": 5, "model__dense_first": 1, "model__ffn_width": 24}
RATE = 0.01


def is_axes(value):
    return isinstance(value, tuple)


@functools.cache
def model():
    fns = functional(tiny.config(**FIELDS).model)
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(fns.init, jax.random.key(0))
    draw = lambda s: random.normal(size=s.shape).astype(np.float32)
    return fns.axes, jax.tree.map(draw, shapes), [jax.tree.map(draw, shapes) for _ in range(STEPS)]


def run(algorithm, **fields):
    """Updates of three steps at the same parameters, each with gradients of its own, at the rate `RATE`."""
    axes, parameters, gradients = model()
    base = {"weight_decay": 0.0, "learning_rate": RATE, "warmup_steps": 0}
    base |= {"schedule": choice("constant"), "algorithm": algorithm} | fields
    optimizer = make_optimizer(tiny.config(**FIELDS, **{f"optimizer__{k}": v for k, v in base.items()}), axes)

    @jax.jit
    def every_step():
        state, found = optimizer.init(parameters), []
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, parameters)
            found.append(jax.tree.map(lambda u: -RATE * u, updates))
        return found

    return jax.device_get(every_step())


def matrices(tree):
    """(path, axes, matrix) of every single matrix and vector, taken off the stacks of layers and experts."""
    axes, *_ = model()
    for (path, names), leaf in zip(jax.tree.leaves_with_path(axes, is_leaf=is_axes), jax.tree.leaves(tree)):
        stacked = sum(name in ("layers", "experts") for name in names)
        for index in np.ndindex(leaf.shape[:stacked]):
            yield jax.tree_util.keystr(path) + str(index), names[stacked:], leaf[index]


def slowly(transformations):
    """Updates with an optax transformation for each matrix alone; transformations(path, axes) -> one."""
    _, parameters, gradients = model()
    ways = [transformations(path, axes) for path, axes, _ in matrices(parameters)]
    ones = [parameter for *_, parameter in matrices(parameters)]

    @jax.jit
    def every_step():
        states, found = [way.init(one) for way, one in zip(ways, ones)], []
        for gradient in gradients:
            pairs = [w.update(g, s, p) for w, (*_, g), s, p in zip(ways, matrices(gradient), states, ones)]
            states = [state for _, state in pairs]
            found.append([update for update, _ in pairs])
        return found

    return jax.device_get(every_step())


def compare(found, expected):
    for tree, ones in zip(found, expected, strict=True):
        for (path, _, update), one in zip(matrices(tree), ones, strict=True):
            np.testing.assert_allclose(update, -RATE * one, rtol=0, atol=2e-5 * RATE * np.abs(one).max(), err_msg=path)


@pytest.mark.parametrize("smallest, relative", [(128, True), (4, True), (4, False)])
def test_adafactor_is_that_of_each_matrix_alone(smallest, relative):
    found = run(choice("adafactor", smallest=smallest, parameter_scale=relative))
    one = [optax.scale_by_factored_rms(min_dim_size_to_factor=smallest), optax.clip_by_block_rms(1.0)]
    one += [optax.scale_by_param_block_rms()] * relative
    compare(found, slowly(lambda path, axes: optax.chain(*one)))


def test_muon_orthogonalises_each_matrix_alone_and_leaves_the_rest_to_adam():
    """By hand: momentum, the quintic iteration of Jordan 2024 on inputs × outputs, a root mean square of 0.2."""
    axes, parameters, gradients = model()
    adam = slowly(lambda path, axes: optax.scale_by_adam(b1=0.9, b2=0.95))
    found = run(choice("muon"))
    momenta = [0.0] * sum(1 for _ in matrices(parameters))
    for step, gradient in enumerate(gradients):
        for i, ((path, names, g), (*_, update)) in enumerate(zip(matrices(gradient), matrices(found[step]))):
            if not any(part in path for part in ("attention'", "feed_forward'")) or "router" in path:
                np.testing.assert_allclose(update, -RATE * adam[step][i], rtol=1e-4, atol=1e-6, err_msg=path)
                continue
            g = g.astype(np.float64)
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            # Nesterov: the momentum that the next step would have with this gradient, both without their bias.
            ahead = 0.95 * momenta[i] / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
            inputs = 1 if names[0] == "width" else len(names) - 1
            flat = ahead.reshape(math.prod(ahead.shape[:inputs]), -1)
            expected = -RATE * iteration(flat) * 0.2 * math.sqrt(max(flat.shape))
            tolerance = 1e-3 * np.abs(expected).max()
            np.testing.assert_allclose(update.reshape(flat.shape), expected, rtol=0, atol=tolerance, err_msg=path)


def iteration(x):
    """X ← a X + (b A + c A²) X with A = X Xᵀ, five times, on the side with fewer rows."""
    flip = x.shape[0] > x.shape[1]
    x = x.T if flip else x
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if flip else x


def test_the_updates_of_muon_are_as_large_as_those_of_adam():
    found = run(choice("muon"))
    sizes = [np.sqrt((u**2).mean()) / RATE for path, axes, u in matrices(found[0]) if "experts'" in path]
    assert len(sizes) == 2 * 3 * 2  # layers, experts, matrices
    assert all(0.13 < size < 0.25 for size in sizes)  # 0.2, as far as five iterations are orthogonal


def test_adamw():
    found = run(choice("adamw"))
    _, parameters, gradients = model()
    for i, (path, _, _) in enumerate(matrices(parameters)):
        mu = nu = 0.0
        for step, gradient in enumerate(gradients, start=1):
            g = list(matrices(gradient))[i][2].astype(np.float64)
            mu, nu = 0.9 * mu + 0.1 * g, 0.95 * nu + 0.05 * g**2
            expected = -RATE * (mu / (1 - 0.9**step)) / (np.sqrt(nu / (1 - 0.95**step)) + 1e-8)
            update = list(matrices(found[step - 1]))[i][2]
            np.testing.assert_allclose(update, expected, rtol=1e-3, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_learning_rate_and_weight_decay_by_group(algorithm):
    groups = {"embedding": (2.0, 0.5), "router": (0.25, 3.0), "experts": (0.5, 2.0), "rest": (1.0, 1.0)}
    plain = run(choice(algorithm))
    found = run(
        choice(algorithm),
        weight_decay=0.1,
        **{name: configs.Group(learning_rate=rate, weight_decay=decay) for name, (rate, decay) in groups.items()},
    )
    _, parameters, _ = model()
    seen = set()
    for (path, _, p), (*_, before), (*_, after) in zip(*map(matrices, (parameters, plain[0], found[0]))):
        group = next((g for g in ("embedding", "router", "experts") if f"'{g}'" in path), "rest")
        rate, decay = groups[group]
        decay = 0 if "norm" in path else 0.1 * decay
        seen.add((group, decay > 0))
        expected = rate * (before - RATE * decay * p)
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-7, err_msg=path)
    assert seen == {("embedding", True), ("router", True), ("experts", True), ("rest", True), ("rest", False)}


def test_untied_output_is_of_the_embedding_group():
    key = jax.tree_util.DictKey
    assert group_of((key("output"),)) == group_of((key("embedding"),)) == "embedding"
    assert group_of((key("prefix"), key(0), key("attention"), key("out"))) == "rest"


@pytest.mark.parametrize("algorithm", OPTIMIZERS)
def test_a_step_of_a_large_model_is_described_without_an_array(algorithm):
    config = tiny.config(model__experts=64, model__width=4096, model__ffn_width=16384, model__layers=32)
    config = configs.resolve(
        configs.Config(model=config.model, optimizer=configs.Optimizer(algorithm=choice(algorithm), warmup_steps=1))
    )
    fns = functional(config.model)
    shapes = jax.eval_shape(fns.init, jax.random.key(0))
    optimizer = make_optimizer(config, fns.axes)
    state = jax.eval_shape(optimizer.init, shapes)
    updates, after = jax.eval_shape(optimizer.update, shapes, state, shapes)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, shapes)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


@pytest.mark.parametrize(
    "algorithm, words",
    [
        (choice("adam"), "optimizer.algorithm.name is 'adam', which is not known; did you mean 'adamw'?"),
        (choice("muon", betas=0.9), "optimizer.algorithm.options.betas is not an option of muon; did you mean 'beta'?"),
    ],
)
def test_a_mistake_is_named(algorithm, words):
    with pytest.raises(UserError) as error:
        run(algorithm)
    assert str(error.value) == words
