import pytest

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.errors import UserError
from sparse_lm.scaling.outcome import config_differences
from sparse_lm.stack import decoder_stack


def make(**model):
    return configs.resolve(configs.Config(name="one", model=configs.Model(**model)))


def test_the_dense_layer_is_as_wide_as_a_tokens_experts_together():
    twin = cost.dense_twin(make(experts=8, top_k=2, router=configs.choice("topk"), expert_width=96))
    assert twin.name == "one-dense"
    assert (twin.model.experts, twin.model.top_k, twin.model.expert_width) == (0, 1, 192)
    assert [spec.hidden for spec in decoder_stack(twin.model).layers[:2]] == [twin.model.ffn_width, 192]


def test_nothing_else_differs():
    config = make(experts=8, top_k=2, router=configs.choice("topk"), expert_width=96)
    fields = {"model.experts", "model.top_k", "model.expert_width"}
    assert set(config_differences(cost.dense_twin(config), config)) == fields


def test_mixing_tokens_into_slots_is_paid_for():
    """Each token enters and leaves every slot: 2 · 2 · slots · width FLOPs forward."""
    config = make(experts=8, router=configs.choice("soft"), capacity_factor=1.0)
    model, twin = config.model, cost.dense_twin(config)
    assert twin.model.expert_width == model.expert_width + model.group_size
    sparse, dense = (cost.count_flops(c.model, c.data.length) for c in (config, twin))
    assert sparse.training - sparse.router == dense.training


def test_a_dense_config_has_no_twin():
    with pytest.raises(UserError, match="model.experts is 0"):
        cost.dense_twin(make())


def test_parameters_differ_by_the_other_experts_and_the_router():
    config = make(experts=8, layers=4)
    sparse, dense = cost.count_parameters(config.model), cost.count_parameters(cost.dense_twin(config).model)
    assert sparse.active - sparse.router == dense.total
