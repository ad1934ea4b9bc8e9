"""Tokenizes and packs documents, and stores the rows as ArrayRecord in a TFDS data set."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from sparse_lm.data.packing import Packer
from sparse_lm.data.sources import Source
from sparse_lm.data.split import Survey
from sparse_lm.data.tokenizer import Tokenizer

VERSION = 1  # of the stored rows; another version makes files of its own
ROWS_PER_SHARD = 1 << 20
CHUNK_CHARACTERS = 1 << 20  # of text that is tokenized at once


def name_split(part: int, kind: str) -> str:
    """Names the TFDS split of a part."""
    return f"{kind}_{part}"


def write_rows(
    folder: epath.Path, sources: list[Source], survey: Survey, tokenizer: Tokenizer, length: int, progress: bool
) -> None:
    """Tokenizes, packs and stores every part: makes a folder with a TFDS data set and a corpus.json.

    Args:
        folder: must not exist yet.
        sources: to read.
        survey: the parts that their documents belong to.
        tokenizer: to encode with.
        length: L, tokens per row.
        progress: whether to show a progress bar, on a terminal.

    Raises:
        OSError: where a row can't be written.
    """
    folder.mkdir()
    names = [name_split(i, part.kind) for i, part in enumerate(survey.parts)]
    packers = [Packer(length, tokenizer.end_of_text, tokenizer.byte_lengths) for _ in survey.parts]
    counts = [dict.fromkeys(("bytes", "tokens", "rows"), 0) for _ in survey.parts]
    writer = _create_writer(folder, length)
    writer.initialize_splits(names)

    def store(part: int, rows: list) -> None:
        if rows:
            counts[part]["rows"] += len(rows)
            writer.add_examples({names[part]: rows})

    total = sum(part.documents for part in survey.parts)
    bar = tqdm(desc="tokenizing", total=total, unit="document", leave=False, disable=None if progress else True)
    with bar, _restore_os_errors():
        for source, part_of_document in zip(sources, survey.part_of_document, strict=True):
            for texts, parts in _read_chunks(source, part_of_document):
                encoded = tokenizer.encode_batch(texts)
                for part in sorted(set(parts)):
                    members = [i for i, p in enumerate(parts) if p == part]
                    documents, sizes = [encoded[i] for i in members], [len(texts[i].encode()) for i in members]
                    counts[part]["bytes"] += sum(sizes)
                    counts[part]["tokens"] += sum(map(len, documents)) + len(documents)
                    store(part, packers[part].add(documents, sizes))
                bar.update(len(texts))
        for part, packer in enumerate(packers):
            store(part, packer.finish())
        writer.close_all()
    parts = [dataclasses.asdict(part) | count for part, count in zip(survey.parts, counts, strict=True)]
    (folder / "corpus.json").write_text(json.dumps({"length": length, "parts": parts}, indent=1))


def _read_chunks(source: Source, part_of_document: np.ndarray) -> Iterator[tuple[list[str], list[int]]]:
    """Yields chunks of the source's documents that belong to a part: their texts and parts."""
    texts, parts, size = [], [], 0
    for document, part in zip(source.reader.documents(), part_of_document.tolist(), strict=False):
        if part >= 0:
            texts.append(document.text)
            parts.append(part)
            size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield texts, parts
            texts, parts, size = [], [], 0
    if texts:
        yield texts, parts


def _create_writer(folder: epath.Path, length: int) -> tfds.core.SequentialWriter:
    identity = tfds.core.dataset_info.DatasetIdentity(
        name="packed_rows", version=tfds.core.Version(f"{VERSION}.0.0"), data_dir=str(folder), module_name=__name__
    )
    features = {
        "tokens": tfds.features.Tensor(shape=(length + 1,), dtype=np.int32),
        "segments": tfds.features.Tensor(shape=(length,), dtype=np.int32),
        "bytes": tfds.features.Scalar(np.int32),
    }
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    return tfds.core.SequentialWriter(info, ROWS_PER_SHARD, file_format="array_record")


@contextlib.contextmanager
def _restore_os_errors() -> Iterator[None]:
    """Turns the RuntimeError of ArrayRecord's writer, such as that for a full disk, back into an OSError."""
    try:
        yield
    except RuntimeError as e:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            if os.strerror(code) in str(e):
                raise OSError(code, os.strerror(code)) from e
        raise
