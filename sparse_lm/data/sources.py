"""Parses `config.data.sources`: the standard library, folders and TFDS data sets."""

import math
from dataclasses import dataclass
from urllib.parse import unquote

from sparse_lm.data.documents import Reader
from sparse_lm.data.folder import Folder
from sparse_lm.data.standard_library import StandardLibrary
from sparse_lm.data.tfds_set import TfdsSet
from sparse_lm.errors import UserError, suggest

# The reader of each kind of source, and its options.
KINDS = {
    "stdlib": (StandardLibrary, ()),
    "folder": (Folder, ("field", "heldout")),
    "tfds": (TfdsSet, ("field", "data_dir")),
}


@dataclass(frozen=True)
class Source:
    """One entry of `config.data.sources`."""

    name: str  # unique in a corpus
    reader: Reader
    weight: float = 1.0  # share of the training rows, relative to the other sources
    max_epochs: int = 0  # after which training stops taking its rows; 0: no limit


def parse_sources(specs: tuple[str, ...]) -> list[Source]:
    """Parses sources: `stdlib`, `folder:PATH` and `tfds:NAME`, with options as in a URL's query.

    Raises:
        UserError: for an unknown kind of source or option, or an invalid value.
    """
    if not specs:
        raise UserError("data.sources is empty; the standard library's source text is 'stdlib'")
    sources = []
    for spec in specs:
        source = _parse_source(spec)
        names = {other.name for other in sources}
        name, n = source.name, 2
        while name in names:
            name, n = f"{source.name}_{n}", n + 1
        sources.append(Source(name, source.reader, source.weight, source.max_epochs))
    return sources


def _parse_source(spec: str) -> Source:
    location, _, query = spec.partition("?")
    kind, _, path = location.partition(":")
    if kind not in KINDS:
        if "/" in location:
            raise UserError(f"data source {spec!r}: a folder is written folder:{location}")
        raise UserError(f"data source {spec!r}: unknown kind {kind!r}{suggest(kind, KINDS)}")
    reader_class, names = KINDS[kind]
    names = (*names, "weight", "max_epochs")
    if bool(path) == (kind == "stdlib"):
        form = {"stdlib": "stdlib", "folder": "folder:PATH", "tfds": "tfds:NAME"}[kind]
        raise UserError(f"data source {spec!r}: it is written {form}")
    options = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in names:
            raise UserError(f"data source {spec!r}: unknown option {name!r}{suggest(name, names)}")
        if not value:
            raise UserError(f"data source {spec!r}: {name} has no value; write {name}=…")
        options[name] = unquote(value)
    weight = _parse_positive(spec, "weight", options.pop("weight", "1"), float)
    max_epochs = options.pop("max_epochs", "")
    max_epochs = _parse_positive(spec, "max_epochs", max_epochs, int) if max_epochs else 0
    reader = reader_class(path, **options) if path else reader_class()
    return Source(reader.name, reader, weight, max_epochs)


def _parse_positive(spec: str, name: str, value: str, kind: type) -> float:
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"data source {spec!r}: {name} is {value!r}; it must be {expected} above 0")
    return number
