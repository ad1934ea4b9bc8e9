"""Which document goes where: a first pass over all text that removes duplicates and draws the splits."""

import hashlib
from array import array
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sparse_lm.data.documents import Document
from sparse_lm.data.sources import Source
from sparse_lm.errors import UserError

# In the order in which a text that occurs several times is given away, so that training never has a copy.
KINDS = ("heldout_domain", "test", "validation", "train")
TRAIN = KINDS.index("train")
SHARES = {"validation": 1, "test": 1, "train": 18}  # of 20, by the document's hash
SAMPLE_BYTES = 20_000_000  # bytes of training text that a tokenizer is trained on


@dataclass
class Part:
    """Documents that are packed and stored together."""

    source: int
    kind: str
    domain: str
    documents: int
    digest: str  # of the documents' hashes


@dataclass
class Survey:
    parts: list[Part]
    assigned: list[np.ndarray]  # for each source the part of each document, int32; -1: left out
    sample: list[str]  # training text for a tokenizer


def survey_sources(sources: list[Source], progress: bool) -> Survey:
    """Reads every document once.

    Raises:
      UserError: a source without text, or with too few documents to have a split of each kind.
    """
    weights = sum(source.weight for source in sources)
    read = [_DocumentTable(int(SAMPLE_BYTES * source.weight / weights)) for source in sources]
    with tqdm(desc="reading text", unit="B", unit_scale=True, leave=False, disable=None if progress else True) as bar:
        for source, documents in zip(sources, read, strict=True):
            for document in source.reader.documents():
                bar.update(documents.add(document))

    hashes = [np.array(documents.hashes, np.uint64) for documents in read]
    kinds = [np.array(documents.kinds, np.int32) for documents in read]
    kept = _mark_first_copies(hashes, kinds)
    parts, assigned = [], []
    for s, source in enumerate(sources):
        _fill_empty_splits(source, hashes[s], kinds[s], kept[s], read[s].drawn)
        place = np.full(len(kinds[s]), -1, np.int32)
        by_domain = np.where(kinds[s] == KINDS.index("validation"), read[s].domains, 0)
        for kind, domain in sorted({*zip(kinds[s][kept[s]].tolist(), by_domain[kept[s]].tolist(), strict=True)}):
            chosen = kept[s] & (kinds[s] == kind) & (by_domain == domain)
            digest = hashlib.sha256(hashes[s][chosen].astype("<u8").tobytes()).hexdigest()
            place[chosen] = len(parts)
            parts.append(Part(s, KINDS[kind], read[s].domain_names[domain], int(chosen.sum()), digest))
        assigned.append(place)
    sample = [
        text
        for documents, kind, keep in zip(read, kinds, kept, strict=True)
        for _, index, text in documents.sample()
        if keep[index] and kind[index] == TRAIN
    ]
    return Survey(parts, assigned, sample)


class _DocumentTable:
    """What is kept of a source's documents: hashes, kinds, domains, and a sample of about `budget` bytes of text."""

    def __init__(self, budget: int):
        self.hashes, self.kinds, self.domains = array("Q"), array("b"), array("i")
        self.domain_names = [""]
        self.drawn = False  # whether any document's split was left to its hash
        self._budget, self._sample, self._size, self._limit = budget, [], 0, 1 << 64

    def add(self, document: Document) -> int:
        """Takes one document; returns its size in bytes."""
        data = document.text.encode()
        value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        if document.domain not in self.domain_names:
            self.domain_names.append(document.domain)
        self.drawn |= not document.kind
        kind = KINDS.index(document.kind or _draw_split(value)) if document.text.strip() else -1
        self.hashes.append(value)
        self.kinds.append(kind)
        self.domains.append(self.domain_names.index(document.domain))
        if kind == TRAIN and value < self._limit:
            self._sample.append((value, len(self.hashes) - 1, document.text))
            self._size += len(data)
            if self._size > 2 * self._budget + (1 << 20):
                self._sample = self.sample()
                self._size = sum(len(text) for _, _, text in self._sample)
        return len(data)

    def sample(self) -> list[tuple[int, int, str]]:
        """The (hash, index, text) of least hash, in order: a fair sample that does not depend on the order of files."""
        self._sample.sort()
        ends = np.cumsum([len(text) for _, _, text in self._sample])
        chosen = self._sample[: int(np.searchsorted(ends, self._budget)) + 1]
        if len(chosen) < len(self._sample):
            self._limit = chosen[-1][0]
        return chosen


def _draw_split(value: int) -> str:
    place = value % sum(SHARES.values())
    for kind, share in SHARES.items():
        if place < share:
            return kind
        place -= share


def _mark_first_copies(hashes: list[np.ndarray], kinds: list[np.ndarray]) -> list[np.ndarray]:
    """For each source a mask of the documents that are neither empty nor a copy of one given away before."""
    every, kind = np.concatenate(hashes), np.concatenate(kinds)
    order = np.argsort(kind, kind="stable")
    order = order[kind[order] >= 0]
    _, first = np.unique(every[order], return_index=True)
    mask = np.zeros(len(every), bool)
    mask[order[first]] = True
    return np.split(mask, np.cumsum([len(h) for h in hashes])[:-1])


def _fill_empty_splits(source: Source, hashes: np.ndarray, kinds: np.ndarray, kept: np.ndarray, drawn: bool) -> None:
    """Gives a source too small for chance one validation and one test document: its training texts of least hash."""
    if not kept.any():
        raise UserError(f"data source {source.name}: the corpus is empty, no document has text of its own")
    wanted = [KINDS.index(kind) for kind in (("validation", "test") if drawn else ("validation",))]
    missing = [kind for kind in wanted if not (kept & (kinds == kind)).any()]
    training = np.flatnonzero(kept & (kinds == TRAIN))
    if len(training) <= len(missing):
        count = f"{kept.sum()} document{'s' if kept.sum() > 1 else ''}"
        raise UserError(f"data source {source.name}: {count}, too few for training, validation and test; add text")
    for kind, index in zip(missing, training[np.argsort(hashes[training])], strict=False):
        kinds[index] = kind
