"""What a source gives: documents, each with its place in the corpus."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol


class Document(NamedTuple):
    """One text. `kind` is the split its source puts it in; "" leaves it to the document's hash."""

    text: str
    kind: str = ""  # "", train, validation, test, heldout_domain
    domain: str = ""  # evaluated apart where it has a name


class Reader(Protocol):
    """What a kind of source gives. Both methods raise `UserError` for what can't be read."""

    name: str  # short, of letters, digits and _

    def fingerprint(self) -> str:
        """Changes whenever the documents change, and is much faster than reading them all."""

    def documents(self) -> Iterator[Document]:
        """All documents, in the same order every time."""
