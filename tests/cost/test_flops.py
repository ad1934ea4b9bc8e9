import dataclasses

import jax
import pytest

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.errors import UserError
from sparse_lm.mesh import make_mesh
from sparse_lm.step.build import build
from tests.cost.dots import dot_flops, gradient_program

SPARSE = {"experts": 4, "capacity_factor": 1.25}


def make(algorithm="adamw", length=64, batch=4, **model):
    sizes = dict(vocabulary=128, width=64, layers=2, heads=4, kv_heads=2, ffn_width=96, scan=False) | model
    optimizer = configs.Optimizer(algorithm=configs.choice(algorithm))
    return configs.resolve(
        configs.Config(
            model=configs.Model(**sizes),
            data=configs.Data(length=length),
            training=configs.Training(batch=batch),
            optimizer=optimizer,
        )
    )


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "geglu", "tied_embeddings": False, "layers": 3, "dense_first": 1},
        SPARSE | {"executor": "gather"},
        SPARSE | {"executor": "einsum", "activation": "swiglu"},
        SPARSE | {"executor": "einsum", "group_size": 32, "layers": 3, "dense_first": 1, "expert_every": 1},
    ],
    ids=["dense", "gated", "gather", "einsum", "groups"],
)
def test_every_product_of_the_traced_program_is_counted(model, remat):
    config = make(**model, remat=remat)
    counted = sum(
        part.training for part in cost.count_flops(config.model, config.data.length).parts if part.name != "elementwise"
    )
    tokens = config.training.batch * config.data.length
    # The balance loss has a product of E multiply-adds per group, which is not counted.
    assert dot_flops(gradient_program(config)) / tokens == pytest.approx(counted, rel=1e-5)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"activation": "swiglu", "tied_embeddings": False, "width": 96},
        SPARSE | {"executor": "gather"},
        SPARSE | {"executor": "einsum", "experts": 8, "vocabulary": 512},
    ],
    ids=["dense", "gated", "gather", "einsum"],
)
def test_a_step_agrees_with_the_compiler(model):
    config = make(**model)
    program = build(config, make_mesh(configs.Mesh(), jax.devices()[:1]))
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)  # counted is the program that is run
    try:
        compiled = program.step.lower(program.abstract_state, program.abstract_batch).compile()
    finally:
        jax.config.update("jax_disable_most_optimizations", quick)
    assert cost.step_flops(config, "cpu") == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


def test_a_hand_counted_dense_model():
    model = make(vocabulary=10, width=4, layers=1, heads=2, kv_heads=1, ffn_width=6, expert_every=1).model
    projections = 2 * (4 * 4 + 2 * 4 * 2 + 4 * 4)
    scores = 2 * (2 * 2) * 8 / 2 * 2  # query·key and weight·value, over half of 8 keys
    assert cost.count_flops(model, 8).forward == projections + scores + 2 * 2 * 4 * 6 + 2 * 4 * 10
    assert cost.count_flops(model, 8).training == 3 * cost.count_flops(model, 8).forward


def test_a_step_of_muon_has_its_newton_schulz_products():
    config = make("muon", vocabulary=10, width=4, layers=1, heads=1, kv_heads=1, ffn_width=6, expert_every=1)
    square, wide = 4 * 4**3 + 2 * 4**3, 4 * 4**2 * 6 + 2 * 4**3
    per_parameter = 34 * cost.count_parameters(config.model).total
    assert cost.optimizer_flops(config) == per_parameter + 5 * (4 * square + 2 * wide)


def test_the_twins_differ_by_the_router_alone():
    config = make(experts=8, top_k=2, layers=4, router=configs.choice("topk"))
    twin = cost.dense_twin(config)
    sparse, dense = (cost.count_flops(c.model, c.data.length) for c in (config, twin))
    assert sparse.training - sparse.router == dense.training
    assert sparse.router == 3 * 2 * (2 * config.model.width * 8)
    assert dense.router == 0


def test_padding_is_executed_and_not_needed():
    config = make(**SPARSE, executor="gather")
    wide = dataclasses.replace(config.model, capacity_factor=2.5)
    one, two = (cost.count_flops(model, 64) for model in (config.model, wide))
    assert one.training == two.training
    experts = lambda cost: sum(part.forward for part in cost.parts if part.name == "experts")
    assert experts(two) == 2 * experts(one)


def test_an_unknown_executor_is_named():
    with pytest.raises(UserError, match="'einsun'.*did you mean 'einsum'"):
        cost.count_flops(make(**SPARSE, executor="einsun").model, 64)
