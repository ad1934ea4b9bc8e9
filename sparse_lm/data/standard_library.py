"""The source code of Python's standard library: about 12 MB of text without a download."""

import ast
import hashlib
import pathlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field

from sparse_lm.data.documents import Document
from sparse_lm.errors import UserError

# Installed packages, tests, and hundreds of nearly equal character tables.
EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
TOPICS = "pydoc_data/topics.py"
# The held-out domain if the interpreter lacks the topics: the first of these folders that exists.
FALLBACK_DOMAINS = ("idlelib", "tkinter", "email")


@dataclass
class StandardLibrary:
    """Modules as documents; the held-out domain is the language reference of `help()`."""

    path: pathlib.Path = field(default_factory=lambda: pathlib.Path(sysconfig.get_path("stdlib")))
    name: str = "stdlib"
    left_out = ""

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self._list_files():
            digest.update(f"{path.relative_to(self.path)}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def documents(self) -> Iterator[Document]:
        files = self._list_files()
        topics = _read_topics(self.path / TOPICS)
        for topic in topics:
            yield Document(topic, kind="heldout_domain")
        heldout = "" if topics else next((d for d in FALLBACK_DOMAINS if (self.path / d).is_dir()), "")
        for path in files:
            relative = path.relative_to(self.path)
            try:
                text = path.read_bytes().decode()
            except UnicodeDecodeError:  # a module in another encoding is not the user's mistake
                continue
            if str(relative) != TOPICS:
                yield Document(text, kind="heldout_domain" if relative.parts[0] == heldout else "")

    def _list_files(self) -> list[pathlib.Path]:
        files = sorted(
            path
            for path in self.path.rglob("*.py")
            if not EXCLUDED.intersection(path.relative_to(self.path).parts) and path.is_file()
        )
        if not files:
            raise UserError(f"this Python has no source text of its standard library in {self.path}; use folder:PATH")
        return files


def _read_topics(path: pathlib.Path) -> list[str]:
    """Parses a module, without running it, and returns the texts of its largest dict of strings; [] if it has none."""
    if not path.is_file():
        return []
    tables = [node.values for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Dict)]
    texts = [[v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)] for values in tables]
    return max(texts, key=len, default=[])
