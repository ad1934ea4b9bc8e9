import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm import config as configs
from sparse_lm.config import choice
from sparse_lm.models.context import Aux
from sparse_lm.models.decoder import join_routed, split_routed
from sparse_lm.stack import LayerSpec, Stack, decoder_stack
from sparse_lm.step.layout import checkpoint_names
from tests import tiny

PLAIN = LayerSpec(choice("full"), choice("dense"), 8)
ROUTED = dataclasses.replace(PLAIN, feed_forward=choice("experts"), routed=True)
STACKS = {
    "routed prefix, two routed places": Stack((PLAIN, ROUTED), (ROUTED, PLAIN, ROUTED), 2),
    "every layer": Stack((), (ROUTED,), 3),
    "the last of two": Stack((PLAIN,), (PLAIN, ROUTED), 2),
    "none": Stack((PLAIN,), (PLAIN,), 2),
}


def test_a_decoder_has_a_prefix_and_a_period_whose_last_layer_has_the_experts():
    model = tiny.config(
        model__layers=7, model__dense_first=1, model__expert_every=3, model__experts=2, model__expert_width=9
    ).model
    stack = decoder_stack(model)
    assert [spec.routed for spec in stack.layers] == [False, False, False, True, False, False, True]
    assert [spec.hidden for spec in stack.layers] == [32, 32, 32, 9, 32, 32, 9]
    assert (stack.routed_layers, stack.repeats) == ([3, 6], 2)
    assert [spec.feed_forward.name for spec in stack.period] == ["dense", "dense", "experts"]


@pytest.mark.parametrize(
    "fields, kind",
    [
        ({}, "dense"),
        ({"model__experts": 4}, "experts"),
        ({"model__layout": choice("banded", block=4)}, "blocks"),
        ({"model__feed_forward": choice("other", rate=2)}, "other"),
    ],
)
def test_what_stands_in_the_last_place(fields, kind):
    assert decoder_stack(tiny.config(**fields).model).period[-1].feed_forward.name == kind


def test_layers_are_numbered_repeat_by_repeat():
    stack = STACKS["routed prefix, two routed places"]
    assert [stack.layer_numbers("prefix", place) for place in range(2)] == [[0], [1]]
    assert [stack.layer_numbers("period", place) for place in range(3)] == [[2, 5], [3, 6], [4, 7]]
    assert stack.routed_layers == [1, 2, 4, 5, 7]


@pytest.mark.parametrize("name", STACKS)
def test_what_is_routed_is_split_by_place_and_joined_by_layer(name):
    """Against a loop over the layers: each finds its own, and reports come back in the order of the layers."""
    stack = STACKS[name]
    count = len(stack.routed_layers)
    by_layer = {"bias": jnp.arange(count * 2).reshape(count, 2)}
    prefix, period = split_routed(by_layer, stack)
    found = [tree for spec, tree in zip(stack.prefix, prefix) if spec.routed]
    for repeat in range(stack.repeats):
        found += [
            jax.tree.map(lambda a, r=repeat: a[r], tree) for spec, tree in zip(stack.period, period) if spec.routed
        ]
    assert [tree["bias"].tolist() for tree in found] == by_layer["bias"].tolist()
    report = lambda tree: Aux({}, tree, None)
    joined = join_routed(
        [report(tree) for spec, tree in zip(stack.prefix, prefix) if spec.routed],
        [report(tree) for spec, tree in zip(stack.period, period) if spec.routed],
    )
    if count:
        np.testing.assert_array_equal(joined.statistics["bias"], by_layer["bias"])
    else:
        assert joined is None


@pytest.mark.parametrize("name", STACKS)
def test_every_layer_has_one_name_in_a_checkpoint(name):
    stack = STACKS[name]
    key = jax.tree_util.DictKey
    paths = [(key("prefix"), key(i), key("w")) for i in range(len(stack.prefix))]
    paths += [(key("period"), key(i), key("w")) for i in range(len(stack.period))]
    names = [checkpoint_names(stack, path) for path in paths]
    flat = sum(([n] if isinstance(n, str) else n for n in names), [])
    assert sorted(flat) == [f"layer_{layer:03d}/w" for layer in range(len(stack.layers))]
    routed = checkpoint_names(stack, (key("routed"), key("bias")))
    assert routed == [f"layer_{layer:03d}/bias" for layer, spec in enumerate(stack.layers) if spec.routed]


def test_a_stack_is_the_same_for_the_same_config():
    model = configs.resolve(configs.Config()).model
    assert decoder_stack(model) == decoder_stack(dataclasses.replace(model))
