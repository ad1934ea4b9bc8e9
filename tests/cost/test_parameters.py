import jax
import pytest

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.models import functional


def make(**model):
    return configs.resolve(configs.Config(model=configs.Model(**model)))


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"experts": 8},
        {"experts": 8, "activation": "swiglu", "kv_heads": 2, "head_width": 16, "expert_width": 96},
        {"experts": 4, "layers": 5, "dense_first": 2, "expert_every": 3, "tied_embeddings": False},
    ],
)
def test_total_is_that_of_the_model(model):
    config = make(**model)
    leaves = jax.tree.leaves(jax.eval_shape(functional(config.model).init, jax.random.key(0)))
    assert cost.count_parameters(config.model).total == sum(leaf.size for leaf in leaves)


def test_active_leaves_out_the_other_experts():
    model = make(experts=8, top_k=2, router=configs.choice("topk"), layers=2, width=16, heads=2, ffn_width=32).model
    counted = cost.count_parameters(model)
    assert counted.experts == 8 * 2 * 16 * 32
    assert counted.total - counted.active == 6 * 2 * 16 * 32


def test_layers_and_what_is_around_them_add_up():
    model = make(experts=4, layers=6, dense_first=2, tied_embeddings=False).model
    around = 2 * model.vocabulary * model.width + model.width
    total = sum(cost.count_parameters(model, layer).total for layer in range(6)) + around
    assert total == cost.count_parameters(model).total
