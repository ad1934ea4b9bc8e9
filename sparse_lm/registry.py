"""Looks up and creates what a `Choice` in a config names."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sparse_lm.config import Choice
from sparse_lm.errors import UserError, suggest
from sparse_lm.ranges import explain_fault, strip_range


def lookup(field: str, table: Mapping[str, Any], name: str) -> Any:
    """Returns table[name]; the `UserError` for an unknown name says the field and a close name."""
    if name not in table:
        raise UserError(f"{field} is {name!r}, which is not known{suggest(name, table)}")
    return table[name]


def create(field: str, table: Mapping[str, Callable], choice: Choice, *args) -> Any:
    """Returns table[choice.name](*args, **choice.options).

    Args:
        field: the config's field of the choice, for messages.
        table: functions or classes by name; the keyword-only parameters of one are its options.
        choice: name and options.
        args: passed on.

    Raises:
        UserError: for an unknown name or option, or an option of another type.
    """
    make = lookup(f"{field}.name", table, choice.name)
    function = make.__init__ if inspect.isclass(make) else make
    valid = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}
    options = dict(choice.options)
    for name, value in options.items():
        if name not in valid:
            hint = suggest(name, valid) if valid else "; it has none"
            raise UserError(f"{field}.options.{name} is not an option of {choice.name}{hint}")
        kind = strip_range(valid[name].annotation)
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{field}.options.{name} is {value!r}; it must be of type {kind.__name__}")
        if wrong := explain_fault(valid[name].annotation, value):
            raise UserError(f"{field}.options.{name} is {value!r}{wrong}")
    return make(*args, **options)
