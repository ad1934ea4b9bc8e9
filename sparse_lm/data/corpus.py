"""Text made ready once, and found again in the cache by what it was made of."""

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

log = logging.getLogger(__name__)


class Corpus:
    """Prepared rows of all sources."""

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
        """Batches of the training rows of all sources, by weight, each source shuffled anew in every epoch."""
        datasets, weights = [], []
        for part in self._splits["train"]:
            source = self._sources[self.parts[part]["source"]]
            own = int(np.random.SeedSequence([seed, part]).generate_state(1)[0])
            rows = grain.MapDataset.source(self._open_part(part)).shuffle(seed=own)
            datasets.append(rows.repeat(source.max_epochs or None))
            weights.append(source.weight)
        rows = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
        limited = any(source.max_epochs for source in self._sources)
        return Batches(rows, batch, self.length, len(rows) // batch if limited else sys.maxsize)

    def evaluation_batches(self, split: str, batch: int, rows: int = 0) -> Batches:
        """Batches of the first rows of a split (0: all), the last one filled up with padding rows.

        Rows come in an order in which any number of first rows is spread evenly over the split; where several sources
        have it, they take turns by weight until one ends.

        Raises:
          UserError: no such split.
        """
        if split not in self._splits:
            raise UserError(f"no data split {split!r}{suggest(split, self.split_names)}")
        parts = self._splits[split]
        sizes = [self.parts[part]["rows"] for part in parts]
        owners = [self.parts[part]["source"] for part in parts]
        totals = {owner: sum(n for n, o in zip(sizes, owners, strict=True) if o == owner) for owner in owners}
        weights = [self._sources[o].weight * n / totals[o] for n, o in zip(sizes, owners, strict=True)]
        chosen = Interleaved([self._open_part(part) for part in parts], weights, rows)
        return Batches(chosen, batch, self.length, -(-len(chosen) // batch))

    def _open_part(self, part: int):
        return self._builder.as_data_source(name_split(part, self.parts[part]["kind"]))


def prepare(config: Config) -> Corpus:
    """The corpus of a resolved config, from the cache or made now; several processes may ask at once.

    Raises:
      UserError: for whatever is wrong with the sources or the tokenizer.
      OSError: a full disk; what was written is removed.
    """
    sources = parse_sources(config.data.sources)
    cache = epath.Path(config.cache).expanduser() / "data"
    if "://" in str(cache):
        raise UserError(f"cache is {config.cache!r}; it must be a local or mounted folder (sources may be remote)")
    keys = [source.reader.fingerprint() for source in sources]
    text = digest([VERSION, keys, SHARES])
    trained = (
        cache / f"tokenizer-{digest([text, config.model.vocabulary, _relative_weights(sources), SAMPLE_BYTES])}.json"
    )

    def rows(tokenizer: Tokenizer) -> epath.Path:
        return cache / f"rows-{digest([text, tokenizer.digest, config.data.length])}"

    def ready() -> Corpus | None:
        tokenizer = _load_tokenizer(config, trained)
        return Corpus(rows(tokenizer), sources, tokenizer) if tokenizer and rows(tokenizer).exists() else None

    if corpus := ready():
        return corpus
    cache.mkdir(parents=True, exist_ok=True)
    with file_lock(cache / f"{text}.lock"):
        if corpus := ready():  # made by another process while this one waited
            return corpus
        log.info("preparing the text of %s, once", ", ".join(config.data.sources))
        found = survey_sources(sources, config.logging.progress)
        _check_unchanged(sources, keys)
        tokenizer = _load_tokenizer(config, trained)
        if tokenizer is None:
            log.info("training a tokenizer of %d tokens", config.model.vocabulary)
            tokenizer = tokenizers.from_json(tokenizers.train(found.sample, config.model.vocabulary))
            with atomic_path(trained) as path:
                path.write_bytes(tokenizer.file)
        with atomic_path(rows(tokenizer)) as path:
            write_rows(path, sources, found, tokenizer, config.data.length, config.logging.progress)
            _check_unchanged(sources, keys)
    corpus = Corpus(rows(tokenizer), sources, tokenizer)
    total = {name: sum(part[name] for part in corpus.parts) for name in ("documents", "bytes", "tokens")}
    log.info("prepared %(documents)d documents, %(bytes)d bytes, %(tokens)d tokens", total)
    return corpus


def _load_tokenizer(config: Config, trained: epath.Path) -> Tokenizer | None:
    """The tokenizer that the config names, or the trained one if it is there yet."""
    if not config.data.tokenizer:
        return tokenizers.from_json(trained.read_bytes()) if trained.exists() else None
    tokenizer = tokenizers.load(config.data.tokenizer)
    if (size := tokenizer.vocabulary_size) > config.model.vocabulary:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer!r} has {size} tokens, more than model.vocabulary="
            f"{config.model.vocabulary}; set model.vocabulary to at least {size}"
        )
    return tokenizer


def _check_unchanged(sources: list[Source], keys: list[str]) -> None:
    for source, key in zip(sources, keys, strict=True):
        if source.reader.fingerprint() != key:
            raise UserError(f"data source {source.name} was changed while it was read; run again once it is finished")


def _relative_weights(sources: list[Source]) -> list[float]:
    return [source.weight / sources[0].weight for source in sources]


def _group_splits(parts: list[dict], sources: list[Source]) -> dict[str, list[int]]:
    """The splits by name, each with the parts it is made of: one of each kind, then validation by source and domain."""
    splits = {}
    for kind in ("train", "validation", "test", "heldout_domain"):
        if chosen := [i for i, part in enumerate(parts) if part["kind"] == kind]:
            splits[kind] = chosen
    for i in splits["validation"]:
        source = f"_{sources[parts[i]['source']].name}" if len(sources) > 1 else ""
        domain = "_" + "".join(c if c.isalnum() else "_" for c in parts[i]["domain"]) if parts[i]["domain"] else ""
        for name in {f"validation{source}", f"validation{source}{domain}"} - {"validation"}:
            splits.setdefault(name, []).append(i)
    return splits
