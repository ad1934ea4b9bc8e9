"""Where text comes from: one interface over the standard library, folders and TFDS data sets."""

import math
from dataclasses import dataclass
from urllib.parse import unquote

from sparse_lm.data.documents import Reader
from sparse_lm.data.folder import Folder
from sparse_lm.data.standard_library import StandardLibrary
from sparse_lm.data.tfds_set import TfdsSet
from sparse_lm.errors import UserError, suggest

# Kinds of source: the reader and the options it takes.
KINDS = {
    "stdlib": (StandardLibrary, ()),
    "folder": (Folder, ("field", "heldout")),
    "tfds": (TfdsSet, ("field", "data_dir")),
}


@dataclass(frozen=True)
class Source:
    """One entry of `config.data.sources`."""

    name: str  # unique among the sources of a corpus
    reader: Reader
    weight: float = 1.0  # share of the training rows, relative to the other sources
    max_epochs: int = 0  # how often training may see each row at most; 0: no limit


def parse_sources(specs: tuple[str, ...]) -> list[Source]:
    """The sources named by `stdlib`, `folder:PATH` and `tfds:NAME`, with options as in a URL's query.

    Raises:
      UserError: an unknown kind of source, an unknown option, or a value that is none.
    """
    if not specs:
        raise UserError("data.sources is empty; the standard library's source text is 'stdlib'")
    sources = []
    for spec in specs:
        source = _parse_source(spec)
        taken = {other.name for other in sources}
        name, n = source.name, 2
        while name in taken:
            name, n = f"{source.name}_{n}", n + 1
        sources.append(Source(name, source.reader, source.weight, source.max_epochs))
    return sources


def _parse_source(spec: str) -> Source:
    where, _, query = spec.partition("?")
    kind, _, path = where.partition(":")
    if kind not in KINDS:
        if "/" in where:
            raise UserError(f"data source {spec!r}: a folder is written folder:{where}")
        raise UserError(f"data source {spec!r}: unknown kind {kind!r}{suggest(kind, KINDS)}")
    make, names = KINDS[kind]
    if bool(path) == (kind == "stdlib"):
        form = {"stdlib": "stdlib", "folder": "folder:PATH", "tfds": "tfds:NAME"}[kind]
        raise UserError(f"data source {spec!r}: it is written {form}")
    options = {}
    for pair in query.split("&") if query else ():
        name, _, value = pair.partition("=")
        if name not in (*names, "weight", "max_epochs"):
            raise UserError(
                f"data source {spec!r}: unknown option {name!r}{suggest(name, (*names, 'weight', 'max_epochs'))}"
            )
        if not value:
            raise UserError(f"data source {spec!r}: {name} has no value; write {name}=…")
        options[name] = unquote(value)
    weight = _parse_positive(spec, "weight", options.pop("weight", "1"), float)
    repeats = options.pop("max_epochs", "")
    max_epochs = _parse_positive(spec, "max_epochs", repeats, int) if repeats else 0
    reader = make(path, **options) if path else make()
    return Source(reader.name, reader, weight, max_epochs)


def _parse_positive(spec: str, name: str, value: str, kind: type) -> float:
    try:
        number = kind(value)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"data source {spec!r}: {name} is {value!r}; it must be {what} above 0")
    return number
