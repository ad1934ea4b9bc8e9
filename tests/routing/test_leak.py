"""What `leak` says of a model; that it is so is shown for every router in test_every_router.py."""

import math

import pytest

from sparse_lm.routing import leak
from tests import tiny

DROPS = "over several devices, rows that one has no room for are dropped, whatever came first"


@pytest.mark.parametrize("executor, said", [("auto", DROPS), ("grouped", DROPS), ("gather", ""), ("einsum", "")])
def test_a_finite_buffer_of_the_exchange_looks_ahead_in_training(executor, said):
    model = tiny.config(model__experts=4, model__executor=executor, model__exchange_buffer=1.5).model
    assert leak(model, math.inf, training=True) == said
    assert leak(model, math.inf) == ""


def test_a_buffer_without_bounds_does_not():
    model = tiny.config(model__experts=4, model__executor="grouped").model
    assert leak(model, math.inf, training=True) == ""


def test_a_dense_model_does_not():
    assert leak(tiny.config(model__exchange_buffer=1.5).model, 1.0, training=True) == ""
