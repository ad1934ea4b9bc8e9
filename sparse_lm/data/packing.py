"""Packs documents into rows of fixed length, and unpacks rows into the arrays that a model takes."""

from collections.abc import Sequence

import numpy as np

Row = dict[str, np.ndarray]


class Packer:
    """Concatenates documents and cuts the stream into rows.

    A document of tokens t1 … tn is n + 1 predictions: inputs [end, t1 … tn], targets [t1 … tn, end]. The targets of the
    stream are its inputs shifted by one, so a row holds `tokens` [L + 1], `segments` [L] (1, 2, … for the documents in
    the row, 0 for padding) and `bytes` (of text in the targets).
    """

    def __init__(self, length: int, end_of_text: int, byte_lengths: np.ndarray):
        """Starts an empty stream.

        Args:
            length: L, tokens per row.
            end_of_text: the token between documents.
            byte_lengths: [V], bytes of text of each token.
        """
        self.length, self.end_of_text, self.byte_lengths = length, end_of_text, byte_lengths
        self.documents = 0  # packed so far
        self._stream = np.zeros((4, 0), np.int64)  # inputs, targets, document, bytes

    def add(self, documents: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[Row]:
        """Adds documents.

        Args:
            documents: token ids.
            sizes: bytes of the text of each document.

        Returns:
            The rows that are now full.
        """
        columns = [self._stream]
        for tokens, size in zip(documents, sizes, strict=True):
            self.documents += 1
            ids = np.asarray(tokens, np.int64)
            column = np.zeros((4, len(ids) + 1), np.int64)
            column[0, 0], column[0, 1:] = self.end_of_text, ids
            column[1, :-1], column[1, -1] = ids, self.end_of_text
            column[2] = self.documents
            column[3, :-1] = _spread_bytes(self.byte_lengths[ids], size)
            columns.append(column)
        stream = np.concatenate(columns, axis=1)
        full = stream.shape[1] // self.length * self.length
        self._stream = stream[:, full:]
        return self._rows(stream[:, :full])

    def finish(self) -> list[Row]:
        """Returns the last row, padded; no row if the stream ends with a full one."""
        if not (used := self._stream.shape[1]):
            return []
        stream = np.pad(self._stream, ((0, 0), (0, self.length - used)))
        self._stream = stream[:, :0]
        (row,) = self._rows(stream)
        row["tokens"][used] = self.end_of_text
        row["segments"][used:] = 0
        return [row]

    def _rows(self, stream: np.ndarray) -> list[Row]:
        inputs, targets, document, size = stream.reshape(4, -1, self.length)
        tokens = np.concatenate([inputs, targets[:, -1:]], axis=1).astype(np.int32)
        segments = (document - document[:, :1] + 1).astype(np.int32)
        sizes = size.sum(1).astype(np.int32)
        return [{"tokens": t, "segments": s, "bytes": b} for t, s, b in zip(tokens, segments, sizes, strict=True)]


def _spread_bytes(lengths: np.ndarray, size: int) -> np.ndarray:
    """Computes the bytes of each token, scaled to sum to `size` where the tokenizer has normalised the text."""
    ends = np.cumsum(lengths)
    if not len(ends) or ends[-1] == size:
        return lengths
    ends = np.round(ends * (size / ends[-1])) if ends[-1] else np.linspace(0, size, len(ends) + 1)[1:].round()
    return np.diff(ends.astype(np.int64), prepend=0)


def unpack_rows(tokens: np.ndarray, segments: np.ndarray) -> Row:
    """Computes model inputs from stored rows.

    Args:
        tokens: [B, L + 1].
        segments: [B, L], 0 for padding.

    Returns:
        `inputs`, `targets`, `segments` and `positions`, int32 [B, L], 0 for padding. Positions start at 0 in every
        piece of a document, also in one that continues from the row before.
    """
    valid = segments != 0
    index = np.arange(segments.shape[1], dtype=np.int32)
    begins = np.diff(segments, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
    arrays = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": index - first}
    return {name: np.where(valid, value, 0).astype(np.int32) for name, value in arrays.items()}
