"""The rule of the executors, one line for each thing that its docstring says."""

import itertools
import math

import pytest

from sparse_lm.experts import EXECUTORS
from sparse_lm.experts.auto import choose_executor, executor_name
from sparse_lm.routing import ExpertChoice, SoftSlots, TokenChoice
from tests import tiny


def choose(platform, form=TokenChoice, size=512, experts=8, top_k=2, capacity=128, width=8192):
    shape = dict(group_size=size, num_experts=experts, top_k=top_k, capacity=capacity, expert_width=width)
    return choose_executor(platform, form, **shape)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("form, name", [(SoftSlots, "einsum"), (ExpertChoice, "gather")])
def test_mixtures_need_masks_and_experts_that_choose_fill_every_place(platform, form, name):
    for capacity, width in itertools.product((1, 128, 512), (64, 8192)):
        assert choose(platform, form, capacity=capacity, width=width) == name


@pytest.mark.parametrize(
    "fields, tpu, gpu",
    [
        ({}, "einsum", "gather"),  # 1024 places for 1024 choices, masks a sixteenth of the experts
        ({"width": 5120}, "einsum", "gather"),  # a tenth
        ({"width": 5119}, "gather", "gather"),  # masks are too dear
        ({"size": 1024, "capacity": 256}, "gather", "gather"),  # so they are for larger groups
        ({"capacity": 256}, "einsum", "gather"),  # half of the places are filled
        ({"capacity": 257}, "grouped", "grouped"),  # fewer are
        ({"capacity": 512}, "grouped", "grouped"),  # dropless
        ({"top_k": 1, "capacity": 129}, "grouped", "grouped"),
        ({"top_k": 4, "capacity": 512}, "einsum", "gather"),  # dropless, and yet half full
        ({"experts": 1, "top_k": 1, "capacity": 512}, "einsum", "gather"),  # all full
    ],
)
def test_places_and_the_price_of_masks_decide_where_tokens_choose(fields, tpu, gpu):
    assert [choose(platform, **fields) for platform in ("tpu", "gpu", "cpu")] == [tpu, gpu, "grouped"]


def test_a_model_names_its_executor_or_leaves_it_to_the_rule():
    model = tiny.config(model__experts=8, model__capacity_factor=1.0).model
    assert executor_name(model, TokenChoice, "gpu") == "gather"
    assert executor_name(model, TokenChoice, "gpu", math.inf) == "grouped"
    assert executor_name(model, TokenChoice, "cpu") == "grouped"
    assert executor_name(model, SoftSlots, "cpu") == "einsum"
    for name in EXECUTORS:
        if name != "auto":
            model = tiny.config(model__experts=8, model__executor=name).model
            assert executor_name(model, SoftSlots, "cpu") == name
