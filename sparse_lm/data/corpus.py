"""Prepares a corpus once and caches it under a hash of its sources, tokenizer and row length."""

import json
import logging
import sys

import grain
import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from sparse_lm.config import Config, digest
from sparse_lm.data import tokenizer as tokenizers
from sparse_lm.data.cache import atomic_path, file_lock
from sparse_lm.data.pipeline import Batches, Interleaved
from sparse_lm.data.sources import Source, parse_sources
from sparse_lm.data.split import SAMPLE_BYTES, SHARES, survey_sources
from sparse_lm.data.store import VERSION, name_split, write_rows
from sparse_lm.data.tokenizer import Tokenizer
from sparse_lm.errors import UserError, suggest
from sparse_lm.paths import user_path

log = logging.getLogger(__name__)


class Corpus:
    """The packed rows of all sources. `fingerprint` is a hash of all that its batches depend on, but for the seed."""

    def __init__(self, folder: epath.Path, sources: list[Source], tokenizer: Tokenizer):
        description = json.loads((folder / "corpus.json").read_text())
        self.tokenizer = tokenizer
        self.length: int = description["length"]  # L
        self.parts: list[dict] = description["parts"]  # source, kind, domain, documents, digest, bytes, tokens, rows
        self._sources = sources
        self._builder = tfds.builder_from_directory(folder)
        self._splits = _group_splits(self.parts, sources)
        self.split_names = tuple(self._splits)
        texts = [[part[key] for key in ("source", "kind", "domain", "digest")] for part in self.parts]
        self.fingerprint = digest([VERSION, texts, SHARES, tokenizer.digest, self.length, _relative_weights(sources)])

    def training_batches(self, seed: int, batch: int) -> Batches:
        """Mixes the training rows of all sources by weight, each source shuffled anew in every epoch.

        Args:
            seed: of the shuffle.
            batch: B, rows per batch.
        """
        datasets, weights = [], []
        for part in self._splits["train"]:
            source = self._sources[self.parts[part]["source"]]
            part_seed = int(np.random.SeedSequence([seed, part]).generate_state(1)[0])
            rows = grain.MapDataset.source(self._open_part(part)).shuffle(seed=part_seed)
            datasets.append(rows.repeat(source.max_epochs or None))
            weights.append(source.weight)
        rows = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
        limited = any(source.max_epochs for source in self._sources)
        return Batches(rows, batch, self.length, len(rows) // batch if limited else sys.maxsize)

    def evaluation_batches(self, split: str, batch: int, rows: int = 0) -> Batches:
        """Takes the first rows of a split; padding rows fill the last batch.

        The first n rows are spread evenly over the split for any n. Sources take turns by weight until one ends.

        Args:
            split: one of `split_names`.
            batch: B, rows per batch.
            rows: how many rows; 0: all.

        Raises:
            UserError: for an unknown split.
        """
        if split not in self._splits:
            raise UserError(f"no data split {split!r}{suggest(split, self.split_names)}")
        parts = self._splits[split]
        sizes = [self.parts[part]["rows"] for part in parts]
        owners = [self.parts[part]["source"] for part in parts]
        totals = {owner: sum(n for n, o in zip(sizes, owners, strict=True) if o == owner) for owner in owners}
        weights = [self._sources[o].weight * n / totals[o] for n, o in zip(sizes, owners, strict=True)]
        interleaved = Interleaved([self._open_part(part) for part in parts], weights, rows)
        return Batches(interleaved, batch, self.length, -(-len(interleaved) // batch))

    def _open_part(self, part: int):
        return self._builder.as_data_source(name_split(part, self.parts[part]["kind"]))


def prepare(config: Config) -> Corpus:
    """Opens the corpus of a resolved config from the cache, or makes it. Several processes may call this at once.

    Raises:
        UserError: for a fault in the sources or the tokenizer.
        OSError: for a full disk; incomplete files are removed.
    """
    sources = parse_sources(config.data.sources)
    cache = user_path(config.cache) / "data"
    if "://" in str(cache):
        raise UserError(f"cache is {config.cache!r}; it must be a local or mounted folder (sources may be remote)")
    fingerprints = [source.reader.fingerprint() for source in sources]
    text_digest = digest([VERSION, fingerprints, SHARES])
    tokenizer_key = [text_digest, config.model.vocabulary, _relative_weights(sources), SAMPLE_BYTES]
    tokenizer_path = cache / f"tokenizer-{digest(tokenizer_key)}.json"

    def rows_path(tokenizer: Tokenizer) -> epath.Path:
        return cache / f"rows-{digest([text_digest, tokenizer.digest, config.data.length])}"

    def open_cached() -> Corpus | None:
        tokenizer = _load_tokenizer(config, tokenizer_path)
        return Corpus(rows_path(tokenizer), sources, tokenizer) if tokenizer and rows_path(tokenizer).exists() else None

    if corpus := open_cached():
        return corpus
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / f"{text_digest}.lock"):
        if corpus := open_cached():  # made by another process while this one waited
            return corpus
        log.info("preparing the text of %s, once", ", ".join(config.data.sources))
        for source in sources:
            if source.reader.left_out:
                log.warning("%s: left out are %s", source.name, source.reader.left_out)
        survey = survey_sources(sources, config.logging.progress)
        _check_unchanged(sources, fingerprints)
        tokenizer = _load_tokenizer(config, tokenizer_path)
        if tokenizer is None:
            log.info("training a tokenizer of %d tokens", config.model.vocabulary)
            tokenizer = tokenizers.from_json(tokenizers.train(survey.sample, config.model.vocabulary))
            with atomic_path(tokenizer_path) as path:
                path.write_bytes(tokenizer.file)
        with atomic_path(rows_path(tokenizer)) as path:
            write_rows(path, sources, survey, tokenizer, config.data.length, config.logging.progress)
            _check_unchanged(sources, fingerprints)
    corpus = Corpus(rows_path(tokenizer), sources, tokenizer)
    total = {name: sum(part[name] for part in corpus.parts) for name in ("documents", "bytes", "tokens")}
    log.info("prepared %(documents)d documents, %(bytes)d bytes, %(tokens)d tokens", total)
    return corpus


def _load_tokenizer(config: Config, trained_path: epath.Path) -> Tokenizer | None:
    """Loads the tokenizer that the config names, otherwise the trained one, if it exists."""
    if not config.data.tokenizer:
        return tokenizers.from_json(trained_path.read_bytes()) if trained_path.exists() else None
    tokenizer = tokenizers.load(config.data.tokenizer)
    if (size := tokenizer.vocabulary_size) > config.model.vocabulary:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer!r} has {size} tokens, more than model.vocabulary="
            f"{config.model.vocabulary}; set model.vocabulary to at least {size}"
        )
    return tokenizer


def _check_unchanged(sources: list[Source], fingerprints: list[str]) -> None:
    for source, fingerprint in zip(sources, fingerprints, strict=True):
        if source.reader.fingerprint() != fingerprint:
            raise UserError(f"data source {source.name} was changed while it was read; run again once it is finished")


def _relative_weights(sources: list[Source]) -> list[float]:
    return [source.weight / sources[0].weight for source in sources]


def _group_splits(parts: list[dict], sources: list[Source]) -> dict[str, list[int]]:
    """Lists the parts of each split: one split of each kind, then validation by source and domain."""
    splits = {}
    for kind in ("train", "validation", "test", "heldout_domain"):
        if members := [i for i, part in enumerate(parts) if part["kind"] == kind]:
            splits[kind] = members
    for i in splits["validation"]:
        source = f"_{sources[parts[i]['source']].name}" if len(sources) > 1 else ""
        domain = "_" + "".join(c if c.isalnum() else "_" for c in parts[i]["domain"]) if parts[i]["domain"] else ""
        for name in {f"validation{source}", f"validation{source}{domain}"} - {"validation"}:
            splits.setdefault(name, []).append(i)
    return splits
