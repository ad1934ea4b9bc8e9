"""A folder of the user's own text: .txt, .md and .jsonl files, plain or gzipped; sub-folders are domains."""

import codecs
import gzip
import hashlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

from etils import epath

from sparse_lm.data.documents import Document
from sparse_lm.errors import UserError, suggest
from sparse_lm.paths import in_object_store, user_path

SUFFIXES = (".txt", ".md", ".jsonl")
# A text file up to this size is one document. A longer one is cut at the first blank line after that many bytes, or at
# the first line end after twice as many, so that a single book still has a validation split.
PIECE_BYTES = 16 << 10
# A record of a .jsonl file is one document up to this size, and is cut after each so many characters: tokenizers need a
# hundred times the memory of a text.
RECORD_CHARACTERS = 1 << 20


@dataclass
class Folder:
    """Documents are the lines of .jsonl files and the pieces of other files; first-level sub-folders are domains."""

    path: str  # may be gs://…
    field: str = "text"  # the field of a .jsonl line that holds the text
    heldout: str = "heldout"  # the sub-folder that is never trained on

    def __post_init__(self):
        self.root = user_path(self.path)
        self.name = re.sub(r"\W+", "_", self.root.name, flags=re.ASCII).strip("_") or "folder"
        self.left_out = ""  # files that are not read, by reason, once they have been listed

    def fingerprint(self) -> str:
        files = self._list_files()
        with ThreadPoolExecutor(8) as pool:
            hashes = list(pool.map(_hash_content, files))
        names = [str(path.relative_to(self.root)) for path in files]
        return hashlib.sha256(json.dumps([self.field, self.heldout, names, hashes]).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for path in self._list_files():
            parts = path.relative_to(self.root).parts
            domain = parts[0] if len(parts) > 1 else ""
            kind, domain = ("heldout_domain", "") if domain == self.heldout else ("", domain)
            with path.open("rb") as raw:
                file = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
                is_jsonl = path.name.removesuffix(".gz").endswith(".jsonl")
                texts = self._read_jsonl(path, file) if is_jsonl else _read_pieces(path, file)
                try:
                    yield from (Document(text, kind, domain) for text in texts)
                except (gzip.BadGzipFile, EOFError, zlib.error) as e:
                    raise UserError(f"{path} is not a whole gzip file ({e}); pack it again") from None

    def _list_files(self) -> list[epath.Path]:
        if not self.root.is_dir():
            problem = "is a file, not a folder; name the folder it is in" if self.root.exists() else "does not exist"
            raise UserError(f"data source folder:{self.path}: {self.root} {problem}")
        reasons = dict(_walk_visible(self.root))
        files = sorted(path for path, reason in reasons.items() if not reason)
        left_out = Counter(filter(None, reasons.values()))
        self.left_out = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
        if not files:
            others = f"; left out: {self.left_out}" if self.left_out else ""
            raise UserError(
                f"data source folder:{self.path}: no {', '.join(SUFFIXES)} files in it, plain or .gz{others}"
            )
        domains = {path.relative_to(self.root).parts[0] for path in files if path.parent != self.root}
        if self.heldout != "heldout" and self.heldout not in domains:
            hint = suggest(self.heldout, domains) if domains else "; it has no sub-folders with text"
            raise UserError(f"data source folder:{self.path}: no sub-folder {self.heldout!r} to hold out{hint}")
        return files

    def _read_jsonl(self, path: epath.Path, file: BinaryIO) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as e:
                raise UserError(f"{location}: not UTF-8 at byte {e.start} of the line") from None
            except json.JSONDecodeError as e:
                raise UserError(f"{location}: not JSON ({e.msg} at column {e.colno})") from None
            except (ValueError, RecursionError) as e:
                raise UserError(f"{location}: JSON that can't be read ({e})") from None
            if not isinstance(record, dict):
                raise UserError(f"{location}: a JSON object was expected, this is a {type(record).__name__}")
            if self.field not in record:
                raise UserError(
                    f"{location}: no field {self.field!r}{suggest(self.field, record)} (set it with ?field=NAME)"
                )
            if not isinstance(text := record[self.field], str):
                raise UserError(f"{location}: field {self.field!r} is a {type(text).__name__}, not a text")
            # JSON can write halves of surrogate pairs, which are no text.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from (
                text[start : start + RECORD_CHARACTERS] for start in range(0, len(text) or 1, RECORD_CHARACTERS)
            )


def _walk_visible(folder: epath.Path) -> Iterator[tuple[epath.Path, str]]:
    """Yields the files below a folder, each with what it is left out as; "": it is read. Links are not followed."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if os.path.islink(path):
            yield path, "symbolic links"
        elif path.is_dir():
            yield from _walk_visible(path)
        elif not in_object_store(path) and not os.path.isfile(path):
            yield path, "pipes or devices"
        elif not path.name.removesuffix(".gz").endswith(SUFFIXES):
            yield path, f"files named *{path.suffix or path.name}"
        else:
            yield path, ""


def _hash_content(path: epath.Path) -> str:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as e:
        raise UserError(f"{path} can't be read: {e.strerror or e}") from None
    return digest.hexdigest()


def _read_pieces(path: epath.Path, file: BinaryIO) -> Iterator[str]:
    """Yields the text of a file in pieces that add up to it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    piece, size, offset = [], 0, 0
    while True:
        line = file.readline(PIECE_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            piece.append(decoder.decode(line, final=not line))
        except UnicodeDecodeError as e:
            position = offset - pending + e.start
            raise UserError(f"{path}: not UTF-8 at byte {position} ({e.reason}); convert it, e.g. with iconv") from None
        if "\0" in piece[-1]:
            position = offset + line.find(b"\0")
            raise UserError(f"{path}: byte {position} is 0, which no text has; if it is UTF-16, convert it with iconv")
        if offset == 0:
            piece[0] = piece[0].removeprefix("\ufeff")
        offset += len(line)
        size += len(line)
        if not line or (size >= PIECE_BYTES and not line.strip()) or (size >= 2 * PIECE_BYTES):
            if text := "".join(piece):
                yield text
            piece, size = [], 0
        if not line:
            return
