"""From the name and options of a `Choice` in a config to the registered thing."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sparse_lm.config import Choice
from sparse_lm.errors import UserError, nearest
from sparse_lm.ranges import bare, fault


def lookup(what: str, table: Mapping[str, Any], name: str) -> Any:
    """table[name], or a `UserError` that names the nearest."""
    if name not in table:
        raise UserError(f"{what} is {name!r}, which is not known{nearest(name, table)}")
    return table[name]


def create(what: str, table: Mapping[str, Callable], choice: Choice, *args) -> Any:
    """table[choice.name](*args, **choice.options). Options are its keyword-only parameters, checked against them."""
    make = lookup(f"{what}.name", table, choice.name)
    function = make.__init__ if inspect.isclass(make) else make
    valid = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options = dict(choice.options)
    for name, value in options.items():
        if name not in valid:
            hint = nearest(name, valid) if valid else "; it has none"
            raise UserError(f"{what}.options.{name} is not an option of {choice.name}{hint}")
        kind = bare(valid[name].annotation)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{what}.options.{name} is {value!r}; it must be of type {kind.__name__}")
        if wrong := fault(valid[name].annotation, value):
            raise UserError(f"{what}.options.{name} is {value!r}{wrong}")
    return make(*args, **options)
