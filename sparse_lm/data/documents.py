"""Documents, and the interface of the readers that yield them."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """One text."""

    text: str
    kind: str = ""  # the split: train, validation, test or heldout_domain; "": by the hash of the text
    domain: str = ""  # a domain with a name is evaluated separately


class Reader(Protocol):
    """Reads one kind of source. Both methods raise `UserError` for text that can't be read."""

    name: str  # letters, digits and _
    left_out: str  # what `fingerprint` and `documents` did not read, and of what kind it is; "": nothing

    def fingerprint(self) -> str:
        """Computes a hash that changes with the documents, much faster than by parsing them."""

    def documents(self) -> Iterator[Document]:
        """Yields all documents, always in the same order."""
