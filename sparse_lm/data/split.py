"""Assigns documents to splits, in a first pass over all text that also removes duplicates."""

import hashlib
import logging
from array import array
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from sparse_lm.data.documents import Document
from sparse_lm.data.sources import Source
from sparse_lm.errors import UserError

log = logging.getLogger(__name__)

# A text that occurs several times goes to the first of these splits, so that training never has a copy.
KINDS = ("heldout_domain", "test", "validation", "train")
TRAIN = KINDS.index("train")
SHARES = {"validation": 1, "test": 1, "train": 18}  # of 20, by the document's hash
MAX_DOMAINS = 100  # of a source, with a validation split each, that is with a file that is open while it is written
SAMPLE_BYTES = 20_000_000  # of training text for a tokenizer


@dataclass
class Part:
    """Documents that are packed and stored together."""

    source: int
    kind: str
    domain: str
    documents: int  # how many
    digest: str  # of the documents' hashes


@dataclass
class Survey:
    """The assignment of all documents to parts."""

    parts: list[Part]
    part_of_document: list[np.ndarray]  # for each source the part of each document, int32; -1: left out
    sample: list[str]  # training text for a tokenizer


def survey_sources(sources: list[Source], progress: bool) -> Survey:
    """Reads every document once, and assigns it to a part.

    Args:
        sources: to read.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        UserError: for a source without text, or with too few documents for training, validation and test.
    """
    weights = sum(source.weight for source in sources)
    tables = [_DocumentTable(int(SAMPLE_BYTES * source.weight / weights)) for source in sources]
    with tqdm(desc="reading text", unit="B", unit_scale=True, leave=False, disable=None if progress else True) as bar:
        for source, table in zip(sources, tables, strict=True):
            for document in source.reader.documents():
                bar.update(table.add(document))

    hashes = [np.array(table.hashes, np.uint64) for table in tables]
    kinds = [np.array(table.kinds, np.int32) for table in tables]
    kept = _mark_first_copies(hashes, kinds)
    parts, assigned = [], []
    for s, source in enumerate(sources):
        _fill_empty_splits(source, hashes[s], kinds[s], kept[s], tables[s].uses_hash)
        part_of_document = np.full(len(kinds[s]), -1, np.int32)
        names = tables[s].domain_names
        domains = np.where(kinds[s] == KINDS.index("validation"), tables[s].domains, 0)
        if len(names) > MAX_DOMAINS:
            log.warning("%s has over %d sub-folders: they are not measured one by one", source.name, MAX_DOMAINS)
            domains[:] = 0
        for kind, domain in sorted({*zip(kinds[s][kept[s]].tolist(), domains[kept[s]].tolist(), strict=True)}):
            members = kept[s] & (kinds[s] == kind) & (domains == domain)
            digest = hashlib.sha256(hashes[s][members].astype("<u8").tobytes()).hexdigest()
            part_of_document[members] = len(parts)
            parts.append(Part(s, KINDS[kind], names[domain], int(members.sum()), digest))
        assigned.append(part_of_document)
    sample = [
        text
        for table, kind, keep in zip(tables, kinds, kept, strict=True)
        for _, index, text in table.sample()
        if keep[index] and kind[index] == TRAIN
    ]
    return Survey(parts, assigned, sample)


class _DocumentTable:
    """Hash, kind and domain of each document of a source, and a sample of about `budget` bytes of training text."""

    def __init__(self, budget: int):
        self.hashes, self.kinds, self.domains = array("Q"), array("b"), array("i")
        self._numbers = {"": 0}  # of domains
        self.uses_hash = False  # whether a document's hash has decided its split
        self._budget, self._sample, self._size, self._limit = budget, [], 0, 1 << 64

    def add(self, document: Document) -> int:
        """Adds a document and returns its size in bytes."""
        data = document.text.encode()
        value = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        domain = self._numbers.setdefault(document.domain, len(self._numbers))
        self.uses_hash |= not document.kind
        kind = KINDS.index(document.kind or _draw_split(value)) if document.text.strip() else -1
        self.hashes.append(value)
        self.kinds.append(kind)
        self.domains.append(domain)
        if kind == TRAIN and value < self._limit:
            self._sample.append((value, len(self.hashes) - 1, document.text))
            self._size += len(data)
            if self._size > 2 * self._budget + (1 << 20):
                self._sample = self.sample()
                self._size = sum(len(text) for _, _, text in self._sample)
        return len(data)

    @property
    def domain_names(self) -> list[str]:
        return list(self._numbers)

    def sample(self) -> list[tuple[int, int, str]]:
        """Returns the sampled (hash, index, text): those of smallest hash, in order, whatever the order of files."""
        self._sample.sort()
        ends = np.cumsum([len(text) for _, _, text in self._sample])
        sample = self._sample[: int(np.searchsorted(ends, self._budget)) + 1]
        if len(sample) < len(self._sample):
            self._limit = sample[-1][0]
        return sample


def _draw_split(value: int) -> str:
    remainder = value % sum(SHARES.values())
    for kind, share in SHARES.items():
        if remainder < share:
            return kind
        remainder -= share


def _mark_first_copies(hashes: list[np.ndarray], kinds: list[np.ndarray]) -> list[np.ndarray]:
    """Masks the documents of each source that are neither empty nor a copy of one that was assigned before."""
    all_hashes, kind = np.concatenate(hashes), np.concatenate(kinds)
    order = np.argsort(kind, kind="stable")
    order = order[kind[order] >= 0]
    _, first = np.unique(all_hashes[order], return_index=True)
    mask = np.zeros(len(all_hashes), bool)
    mask[order[first]] = True
    return np.split(mask, np.cumsum([len(h) for h in hashes])[:-1])


def _fill_empty_splits(
    source: Source, hashes: np.ndarray, kinds: np.ndarray, kept: np.ndarray, uses_hash: bool
) -> None:
    """Moves the training texts of smallest hash of a small source to validation and test, where these are empty."""
    if not kept.any():
        raise UserError(f"data source {source.name}: the corpus is empty, no document has text of its own")
    needed = [KINDS.index(kind) for kind in (("validation", "test") if uses_hash else ("validation",))]
    missing = [kind for kind in needed if not (kept & (kinds == kind)).any()]
    training = np.flatnonzero(kept & (kinds == TRAIN))
    if len(training) <= len(missing):
        count = f"{kept.sum()} document{'s' if kept.sum() > 1 else ''}"
        raise UserError(f"data source {source.name}: {count}, too few for training, validation and test; add text")
    for kind, index in zip(missing, training[np.argsort(hashes[training])], strict=False):
        kinds[index] = kind
