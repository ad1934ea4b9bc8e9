"""Reads the config.json of this and earlier versions. Imports no jax.

A missing field takes the value that keeps what the run did, a renamed field is translated, and an unknown field is an
error. So a stored config keeps its meaning.
"""

import contextlib
import copy
import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from sparse_lm import __version__
from sparse_lm.errors import UserError, suggest

# Old dotted path: new dotted path, oldest first. The path of a section renames all fields in it. A name on the left is
# never used for another field.
RENAMED: dict[str, str] = {}

# What a run that lacks a field did, where that is not the default of today.
EARLIER_VALUES: dict[str, Any] = {
    "model.executor": "gather",
    "model.eval_capacity_factor": 2.0,
    "evaluation.final_rows": 1,  # no more than evaluation.rows
}


def fill_config(config: Any, stored: Any, file: str, written_by: str) -> None:
    """Sets the fields of a default config to stored values.

    Args:
        config: the dataclass to fill, not frozen.
        stored: the parsed JSON, which is checked and not changed.
        file: its path, for messages; "" if it is in no file.
        written_by: the version that stored it, for messages; "" if unknown.

    Raises:
        UserError: for an unknown field, or a value of another type.
    """
    try:
        values = _rename_fields(_check_section("the config", stored))
        _set_fields(config, values)
    except UserError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from error
    for path, hint in _find_unknown(config, values):
        message = f"{file or 'the config'} has {path}, which this version ({__version__}) does not know{hint}"
        if written_by:
            message += f"{'' if hint.endswith('?') else '.'} It was written by version {written_by}"
        raise UserError(message)


def _rename_fields(values: dict) -> dict:
    """Moves values to the current names of their fields."""
    values = copy.deepcopy(values) if RENAMED else values
    for old, new in RENAMED.items():
        try:
            value = _pop_path(values, *old.split("."))
        except (KeyError, TypeError, AttributeError):
            continue  # it is missing; a value where a section should be is an error later
        *parents, name = new.split(".")
        section = values
        for depth, parent in enumerate(parents, 1):
            section = _check_section(".".join(parents[:depth]), section.setdefault(parent, {}))
        if name in section:
            raise UserError(f"{old} and {new}, its new name, are both there; remove one")
        section[name] = value
    return values


def _pop_path(values: dict, name: str, *rest: str) -> Any:
    """Removes and returns the value at a path, and removes sections that become empty."""
    if not rest:
        return values.pop(name)
    value = _pop_path(values[name], *rest)
    if not values[name]:
        del values[name]
    return value


def _set_fields(node: Any, values: dict, prefix: str = "") -> None:
    for f in dataclasses.fields(node):
        path = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(f.type):
            _set_fields(getattr(node, f.name), _check_section(path, values.get(f.name, {})), f"{path}.")
        elif f.name in values:
            setattr(node, f.name, _convert_value(path, values[f.name], f.type))
        elif path in EARLIER_VALUES:
            setattr(node, f.name, _convert_value(path, EARLIER_VALUES[path], f.type))


def _check_section(path: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path} is {reprlib.repr(value)}; it must be a section with fields of its own")
    return value


def _convert_value(path: str, value: Any, kind: Any) -> Any:
    """Converts a JSON value to the type of the field."""
    expected = f"of type {kind.__name__}"
    if kind is ConfigDict:
        expected = "a section of options by their names"
        if isinstance(value, dict):
            with contextlib.suppress(AttributeError, ValueError):  # a name with a dot in it, or of a method of Python's
                return ConfigDict(value)
    elif kind == tuple[str, ...]:
        expected = "a list of texts"
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
    elif kind is float and type(value) is int:
        expected = "a number that fits a float"
        with contextlib.suppress(OverflowError):
            return float(value)
    elif type(value) is kind:
        return value
    raise UserError(f"{path} is {reprlib.repr(value)}; it must be {expected}")


def _find_unknown(node: Any, values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the path of each unknown field, with a suggestion."""
    fields = {f.name: f.type for f in dataclasses.fields(node)}
    for name, value in values.items():
        if name not in fields:
            name = str(name)
            yield prefix + (name if name.isprintable() else repr(name)), suggest(name, fields)
        elif dataclasses.is_dataclass(fields[name]):
            yield from _find_unknown(getattr(node, name), value, f"{prefix}{name}.")
