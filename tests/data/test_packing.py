"""The vectorised packer against a slow loop over single predictions."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.data.packing import Packer, unpack_rows

END = 5
BYTE_LENGTHS = np.array([1, 1, 2, 3, 1, 0], np.int32)


def slow_rows(documents, length):
    """Rows as lists of (input, target, document, position, bytes), one prediction at a time."""
    rows, row = [], []
    for d, tokens in enumerate(documents):
        position = 0
        for previous, target in zip([END, *tokens], [*tokens, END], strict=True):
            if len(row) == length:
                rows, row, position = [*rows, row], [], 0
            row.append((previous, target, d, position, int(BYTE_LENGTHS[target])))
            position += 1
    return [*rows, row] if row else rows


def packed(documents, length, chunk):
    packer = Packer(length, END, BYTE_LENGTHS)
    rows = []
    for i in range(0, len(documents), chunk):
        some = documents[i : i + chunk]
        rows += packer.add(some, [int(BYTE_LENGTHS[d].sum()) for d in some])
    rows += packer.finish()
    stacked = {name: np.stack([row[name] for row in rows]) for name in ("tokens", "segments", "bytes")}
    return unpack_rows(stacked["tokens"], stacked["segments"]) | {"bytes": stacked["bytes"]}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=30), min_size=1, max_size=12),
    st.integers(1, 17),
    st.integers(1, 5),
)
def test_rows_are_those_of_a_slow_loop(documents, length, chunk):
    got, want = packed(documents, length, chunk), slow_rows(documents, length)
    assert len(got["inputs"]) == len(want)
    for i, row in enumerate(want):
        n = len(row)
        order = list(dict.fromkeys(d for _, _, d, _, _ in row))
        assert got["inputs"][i, :n].tolist() == [p[0] for p in row]
        assert got["targets"][i, :n].tolist() == [p[1] for p in row]
        assert got["segments"][i, :n].tolist() == [order.index(p[2]) + 1 for p in row]
        assert got["positions"][i, :n].tolist() == [p[3] for p in row]
        assert got["bytes"][i] == sum(p[4] for p in row)
        for name in ("inputs", "targets", "segments", "positions"):
            assert not got[name][i, n:].any()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=30), min_size=1, max_size=12), st.integers(1, 17))
def test_every_token_is_predicted_exactly_once_and_only_the_last_row_has_padding(documents, length):
    rows = packed(documents, length, 4)
    real = rows["segments"] != 0
    assert rows["targets"][real].tolist() == [t for d in documents for t in [*d, END]]
    assert real[:-1].all() and real[-1, 0]
    assert (rows["inputs"][real & (rows["positions"] > 0)] != END).all()


def test_bytes_sum_up_to_the_text_where_the_tokenizer_changed_it():
    packer = Packer(4, END, BYTE_LENGTHS)
    rows = packer.add([[3, 3, 2, 1, 4, 2], [1, 1]], [7, 9]) + packer.finish()
    assert sum(int(row["bytes"]) for row in rows) == 16
    assert all(row["bytes"] >= 0 for row in rows)


def test_a_document_of_unknown_tokens_still_has_its_bytes():
    packer = Packer(8, END, np.zeros(6, np.int32))
    rows = packer.add([[1, 2, 3]], [10]) + packer.finish()
    assert rows[0]["bytes"] == 10
