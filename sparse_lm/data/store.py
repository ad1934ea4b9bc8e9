"""Documents to stored rows: tokenized, packed and written as ArrayRecord in the form of a TFDS data set."""

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

VERSION = 1  # of the stored rows; a new one leaves what older versions prepared alone
ROWS_PER_SHARD = 1 << 20
CHUNK_CHARACTERS = 1 << 20  # characters of text encoded at once


def name_split(part: int, kind: str) -> str:
    return f"{kind}_{part}"


def write_rows(
    folder: epath.Path, sources: list[Source], found: Survey, tokenizer: Tokenizer, length: int, progress: bool
) -> None:
    """Tokenizes, packs and stores every part; the folder is then a TFDS data set with a corpus.json beside."""
    folder.mkdir()
    names = [name_split(i, part.kind) for i, part in enumerate(found.parts)]
    packers = [Packer(length, tokenizer.end_of_text, tokenizer.byte_lengths) for _ in found.parts]
    counts = [dict.fromkeys(("bytes", "tokens", "rows"), 0) for _ in found.parts]
    writer = _create_writer(folder, length)
    writer.initialize_splits(names)

    def store(part: int, rows: list) -> None:
        if rows:
            counts[part]["rows"] += len(rows)
            writer.add_examples({names[part]: rows})

    total = sum(part.documents for part in found.parts)
    bar = tqdm(desc="tokenizing", total=total, unit="document", leave=False, disable=None if progress else True)
    with bar, _restore_os_errors():
        for source, assigned in zip(sources, found.part_of_document, strict=True):
            for texts, parts in _read_chunks(source, assigned):
                encoded = tokenizer.encode_batch(texts)
                for part in sorted(set(parts)):
                    mine = [i for i, p in enumerate(parts) if p == part]
                    documents, sizes = [encoded[i] for i in mine], [len(texts[i].encode()) for i in mine]
                    counts[part]["bytes"] += sum(sizes)
                    counts[part]["tokens"] += sum(map(len, documents)) + len(documents)
                    store(part, packers[part].add(documents, sizes))
                bar.update(len(texts))
        for part, packer in enumerate(packers):
            store(part, packer.finish())
        writer.close_all()
    parts = [dataclasses.asdict(part) | count for part, count in zip(found.parts, counts, strict=True)]
    (folder / "corpus.json").write_text(json.dumps({"length": length, "parts": parts}, indent=1))


def _read_chunks(source: Source, assigned: np.ndarray) -> Iterator[tuple[list[str], list[int]]]:
    """The source's documents that belong to a part, some at a time, and their parts."""
    texts, parts, size = [], [], 0
    for document, part in zip(source.reader.documents(), assigned.tolist(), strict=False):
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
    """ArrayRecord's writer reports a full disk as a RuntimeError; here it is the OSError that it was."""
    try:
        yield
    except RuntimeError as e:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            if os.strerror(code) in str(e):
                raise OSError(code, os.strerror(code)) from e
        raise
