"""A range stands beside each field and option, and every one of them has one that is kept."""

import dataclasses
import inspect
import math
from typing import Annotated

import pytest

from sparse_lm.config import Config, Node, choice, resolve
from sparse_lm.errors import UserError
from sparse_lm.layouts import LAYOUTS
from sparse_lm.models.table import ATTENTIONS, FEED_FORWARDS
from sparse_lm.ranges import OneOf, Range, explain_fault, strip_range
from sparse_lm.registry import create
from sparse_lm.routing import ROUTERS
from sparse_lm.step.optimizer import OPTIMIZERS
from sparse_lm.step.schedules import SCHEDULES

TABLES = (ROUTERS, OPTIMIZERS, SCHEDULES, LAYOUTS, ATTENTIONS, FEED_FORWARDS)


@pytest.mark.parametrize(
    "kind, value, words",
    [
        (Annotated[int, Range(least=1, most=4)], 1, ""),
        (Annotated[int, Range(least=1, most=4)], 5, "; it must be at least 1 and at most 4"),
        (Annotated[float, Range(above=0)], 0.0, "; it must be above 0"),
        (Annotated[float, Range(above=0)], math.inf, ""),
        (Annotated[float, Range(above=0)], math.nan, "; it must be above 0"),
        (Annotated[float, Range(above=0, below=math.inf)], math.inf, "; it must be above 0 and finite"),
        (float, -math.inf, "; it must be finite"),
        (float, math.nan, "; it must be finite"),
        (float, -1e30, ""),
        (Annotated[str, OneOf("full", "none")], "ful", "; did you mean 'full'?"),
        (str, "anything", ""),
    ],
)
def test_what_is_out_of_range_is_told_with_what_would_be_right(kind, value, words):
    assert explain_fault(kind, value) == words


def field_kinds(node: Node, prefix: str = ""):
    for f in dataclasses.fields(node):
        value = getattr(node, f.name)
        if isinstance(value, Node):
            yield from field_kinds(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", node.ranges[f.name]


def test_every_number_of_the_config_has_a_range():
    kinds = dict(field_kinds(Config()))
    assert len(kinds) > 60
    assert not [path for path, kind in kinds.items() if kind in (int, float)]


@pytest.mark.parametrize("path, kind", [(p, k) for p, k in field_kinds(Config()) if strip_range(k) is int])
@pytest.mark.parametrize("value", [-2, 2**31, 2**32, 2**63, 10**30])
def test_a_whole_number_out_of_range_is_refused_by_resolve(path, kind, value):
    config = Config()
    *parents, name = path.split(".")
    node = config
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, name, value)
    with pytest.raises(UserError, match=f"{path} is {value}; it must be"):
        resolve(config)


def numeric_options():
    for table in TABLES:
        for name, made in table.items():
            function = made.__init__ if inspect.isclass(made) else made
            for option, parameter in inspect.signature(function).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY and strip_range(parameter.annotation) in (int, float):
                    yield pytest.param(table, name, option, parameter.annotation, id=f"{name}.{option}")


@pytest.mark.parametrize("table, name, option, kind", list(numeric_options()))
def test_every_number_among_the_options_has_a_range_that_is_kept(table, name, option, kind):
    assert kind not in (int, float)
    for value in (-1, math.nan, 10**30 if strip_range(kind) is int else -math.inf):
        value = value if strip_range(kind) is int and value == value else float(value)
        with pytest.raises(UserError, match=f"a.options.{option} is "):
            create("a", table, choice(name, **{option: value}))
