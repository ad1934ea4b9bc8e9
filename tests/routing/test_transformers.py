"""Expert layers against those of Hugging Face transformers with the same weights, from stored fixtures."""

import math
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparse_lm import config as configs
from sparse_lm.experts import EXECUTORS
from sparse_lm.models.context import Context
from sparse_lm.models.expert_layer import ExpertLayer
from tests import tiny

SCRIPT = pathlib.Path(__file__).parents[1] / "oracles/transformers_blocks.py"
FIXTURES = SCRIPT.with_name("fixtures")


def load(block: str) -> dict:
    """A fixture as SCRIPT describes it; `weights/router` is fixture["weights"]["router"]."""
    fixture = {}
    with np.load(FIXTURES / f"{block}.npz") as stored:
        for path, value in stored.items():
            *folder, name = path.split("/")
            (fixture.setdefault(*folder, {}) if folder else fixture)[name] = value
    return fixture


def as_parameters(weights: dict) -> dict:
    """The weights of a block, or their gradients, at their places in an `ExpertLayer`."""
    three = lambda of: {name: weights[of + name] for name in ("into", "gate", "out") if of + name in weights}
    parts = {"router": {"kernel": weights["router"]}, "experts": three(""), "shared": three("shared_")}
    return {name: part for name, part in parts.items() if part}


def check(block: str, executor: str, router: configs.Choice, factor: float = math.inf, **fields) -> None:
    """A layer with the block's weights makes its choice, output and losses, and their gradients."""
    fixture = load(block)
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), fixture["weights"])
    parameters, state = as_parameters(weights), {name: weights[name] for name in ("bias",) if name in weights}
    x, dy = (jnp.asarray(fixture[name], jnp.float32) for name in ("x", "dy"))
    rows, length, width = x.shape
    experts, _, hidden = parameters["experts"]["into"].shape
    top_k = fixture["expert"].shape[-1]
    model = tiny.config(
        model__width=width,
        model__experts=experts,
        model__expert_width=hidden,
        model__top_k=top_k,
        model__router=router,
        model__executor=executor,
        model__activation="swiglu" if "gate" in weights else "gelu",
        data__length=length,
        training__batch=rows,
        **fields,
    ).model
    graph, made = nnx.split(ExpertLayer(model, model.expert_width, nnx.Rngs(params=0)))
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(made)) == jax.tree.map(jnp.shape, parameters)
    ids, valid = jnp.zeros((rows, length), jnp.int32), jnp.ones((rows, length), bool)
    context = Context(ids, jnp.asarray(valid, jnp.int32), ids, factor)

    @jax.jit
    def run(parameters, x):
        layer = nnx.merge(graph, nnx.State(parameters))
        choice, _, _ = layer.router.route(x, ids, valid, state)
        y, aux = layer(x, context, state, None, None)
        return (y, aux.losses), (choice, aux.statistics["dropped"])

    (y, losses), back, (choice, dropped) = jax.vjp(run, parameters, x, has_aux=True)
    dense = lambda expert, weight: (jax.nn.one_hot(expert, experts) * weight[..., None]).sum(axis=-2)
    tiny.close(dense(*choice[:2]), dense(fixture["expert"], fixture["weight"]))  # whatever the order of the K
    assert dropped == (~fixture["kept"]).sum()
    tiny.close(y, fixture["y"])
    none = {name: jnp.zeros(()) for name in losses}
    found, dx = back((dy, none))
    tiny.close(dx, fixture["gradients"]["x"])
    tiny.close(found, as_parameters(fixture["gradients"]))
    tokens = rows * length
    for name, loss in fixture.get("losses", {}).items():
        assert losses[name] / tokens == pytest.approx(loss, rel=1e-5)
        found, _ = back((jnp.zeros_like(y), none | {name: jnp.ones(())}))
        tiny.close(found["router"]["kernel"] / tokens, fixture["loss_gradients"][name])


@pytest.mark.parametrize("executor", EXECUTORS)
def test_switch_under_a_capacity(executor):
    check("switch", executor, configs.choice("switch", jitter=0.0, balance_loss=1.0, z_loss=1.0), factor=1.25)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_topk_is_mixtral(executor):
    # Of an expert, transformers counts the share of the tokens, not of the choices: its loss is K times ours.
    router = configs.choice("topk", balance_loss=2.0, z_loss=0.0)
    check("mixtral", executor, router, model__balance_over="batch")


@pytest.mark.parametrize("executor", EXECUTORS)
def test_topk_of_all_probabilities_is_olmoe(executor):
    check("olmoe", executor, configs.choice("topk", normalize=False))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_deepseek_is_deepseek_v3(executor):
    check(
        "deepseek_v3", executor, configs.choice("deepseek", groups=4, groups_kept=2, scale=2.5), model__shared_experts=2
    )


@pytest.mark.slow
def test_transformers_makes_these_fixtures(tmp_path):
    """In an environment of its own, with the versions that SCRIPT names."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", "torch==2.13.0", "transformers==5.24.0"], check=True)
    subprocess.run([tmp_path / "venv/bin/python", SCRIPT, tmp_path / "fixtures"], check=True)
    stored = sorted(path.name for path in FIXTURES.glob("*.npz"))
    assert stored == sorted(path.name for path in (tmp_path / "fixtures").iterdir())
    for name in stored:
        with np.load(FIXTURES / name) as old, np.load(tmp_path / "fixtures" / name) as new:
            assert old.keys() == new.keys()
            tiny.close(dict(new), dict(old), tolerance=1e-6)
