"""A config as config.json holds it, whichever version wrote it. Imports no jax.

A field that is missing there takes the default it had when it was added, one that was renamed is translated, and one
that is not known is refused: what was stored goes on meaning what it meant.
"""

import contextlib
import copy
import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from sparse_lm import __version__
from sparse_lm.errors import UserError, nearest

# Old dotted path: the new one, oldest first. The path of a section renames all within it. A name that stands on the
# left is never given to another field.
RENAMED: dict[str, str] = {}

# The default that a field had when it was added, where it has another one now.
FIRST_DEFAULTS: dict[str, Any] = {
    "model.executor": "gather",
    "model.eval_capacity_factor": 2.0,
}


def fill(config: Any, stored: Any, file: str, written_by: str) -> None:
    """Sets the fields of a config that has all its defaults to the stored values.

    Args:
        config: the dataclass to fill, not frozen.
        stored: what JSON gave; it is checked, and left as it is.
        file: where it is stored, for messages; "" where it is in no file.
        written_by: the version that stored it, for messages; "" where that is not known.

    Raises `UserError` for a field that is not known and for a value of another type.
    """
    try:
        values = _translate(_section("the config", stored))
        _set_fields(config, values)
    except UserError as error:
        raise UserError(f"{file}: {error}" if file else str(error)) from error
    for path, hint in _unknown(config, values):
        message = f"{file or 'the config'} has {path}, which this version ({__version__}) does not know{hint}"
        if written_by:
            message += f"{'' if hint.endswith('?') else '.'} It was written by version {written_by}"
        raise UserError(message)


def _translate(values: dict) -> dict:
    """The values under the names that fields have now."""
    values = copy.deepcopy(values) if RENAMED else values
    for old, new in RENAMED.items():
        try:
            value = _take(values, *old.split("."))
        except (KeyError, TypeError, AttributeError):
            continue  # it is not there; what is there in a section's stead is refused later
        *parents, name = new.split(".")
        section = values
        for at, parent in enumerate(parents, 1):
            section = _section(".".join(parents[:at]), section.setdefault(parent, {}))
        if name in section:
            raise UserError(f"{old} and {new}, its new name, are both there; remove one")
        section[name] = value
    return values


def _take(values: dict, name: str, *inside: str) -> Any:
    """Removes the value at a path, and the sections that it leaves empty."""
    if not inside:
        return values.pop(name)
    value = _take(values[name], *inside)
    if not values[name]:
        del values[name]
    return value


def _set_fields(node: Any, values: dict, prefix: str = "") -> None:
    for f in dataclasses.fields(node):
        path = f"{prefix}{f.name}"
        if dataclasses.is_dataclass(f.type):
            _set_fields(getattr(node, f.name), _section(path, values.get(f.name, {})), f"{path}.")
        elif f.name in values:
            setattr(node, f.name, _read(path, values[f.name], f.type))
        elif path in FIRST_DEFAULTS:
            setattr(node, f.name, _read(path, FIRST_DEFAULTS[path], f.type))


def _section(path: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise UserError(f"{path} is {reprlib.repr(value)}; it must be a section with fields of its own")
    return value


def _read(path: str, value: Any, kind: Any) -> Any:
    """A value of the field's type, from what JSON has for it."""
    must = f"of type {kind.__name__}"
    if kind is ConfigDict:
        must = "a section of options by their names"
        if isinstance(value, dict):
            with contextlib.suppress(AttributeError, ValueError):  # a name with a dot in it, or of a method of Python's
                return ConfigDict(value)
    elif kind == tuple[str, ...]:
        must = "a list of texts"
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            return tuple(value)
    elif kind is float and type(value) is int:
        must = "a number that fits a float"
        with contextlib.suppress(OverflowError):
            return float(value)
    elif type(value) is kind:
        return value
    raise UserError(f"{path} is {reprlib.repr(value)}; it must be {must}")


def _unknown(node: Any, values: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The paths that lead to no field, each with the nearest name that does."""
    fields = {f.name: f.type for f in dataclasses.fields(node)}
    for name, value in values.items():
        if name not in fields:
            name = str(name)
            yield prefix + (name if name.isprintable() else repr(name)), nearest(name, fields)
        elif dataclasses.is_dataclass(fields[name]):
            yield from _unknown(getattr(node, name), value, f"{prefix}{name}.")
