from collections import Counter

import pytest

from sparse_lm.data import split
from sparse_lm.data.documents import Document
from sparse_lm.data.sources import Source
from sparse_lm.data.split import survey_sources
from sparse_lm.errors import UserError


class Texts:
    name = "texts"

    def __init__(self, documents):
        self._documents = [Document(d) if isinstance(d, str) else Document(*d) for d in documents]

    def documents(self):
        return iter(self._documents)


def placed(*sources, weights=None):
    """For each source its (text, kind, domain), None for what is left out; and the survey."""
    weights = weights or [1.0] * len(sources)
    made = [Source(f"s{i}", Texts(d), w) for i, (d, w) in enumerate(zip(sources, weights, strict=True))]
    found = survey_sources(made, progress=False)
    places = [
        [
            (document.text, found.parts[part].kind, found.parts[part].domain) if part >= 0 else None
            for document, part in zip(source.reader.documents(), assigned, strict=True)
        ]
        for source, assigned in zip(made, found.part_of_document, strict=True)
    ]
    return places, found


def test_shares_of_a_large_source():
    (places,), _ = placed([f"text {i}" for i in range(20_000)])
    counts = Counter(kind for _, kind, _ in places)
    assert 17_700 < counts["train"] < 18_300
    assert 850 < counts["validation"] < 1150 and 850 < counts["test"] < 1150


def test_a_documents_split_does_not_depend_on_the_others():
    (few,), _ = placed([f"text {i}" for i in range(500)])
    (many,), _ = placed([f"text {i}" for i in reversed(range(1000))])
    assert set(few) <= set(many)


def test_copies_and_empty_texts_are_left_out_and_training_has_none_of_a_held_out_text():
    documents = [
        *(f"text {i}" for i in range(40)),
        "text 3",
        "",
        " \n",
        ("text 4", "heldout_domain"),
        ("own", "heldout_domain"),
    ]
    (places,), _ = placed(documents)
    texts = [place[0] for place in places if place]
    assert sorted(texts) == sorted({*texts}) and len(texts) == 41
    assert places[4] is None and places[43][1] == "heldout_domain"


def test_copies_across_sources():
    _, found = placed(
        [f"text {i}" for i in range(40)], [("text 7", "heldout_domain"), *(f"more {i}" for i in range(40))]
    )
    assert found.part_of_document[0][7] == -1


def test_domains_are_kept_apart_in_validation_alone():
    documents = [(f"text {i}", "", "ab"[i % 2]) for i in range(400)]
    (places,), found = placed(documents)
    assert {(part.kind, part.domain) for part in found.parts} == {
        ("train", ""), ("test", ""), ("validation", "a"), ("validation", "b")
    }  # fmt: skip
    assert all(int(text.split()[1]) % 2 == "ab".index(domain) for text, _, domain in places if domain)


def test_a_small_source_has_one_document_of_each_kind():
    (places,), found = placed(["a", "b", "c"])
    assert sorted(kind for _, kind, _ in places) == ["test", "train", "validation"]
    assert found.sample == [text for text, kind, _ in places if kind == "train"]


def test_splits_that_a_source_has_are_kept():
    documents = [(f"t{i}", "train") for i in range(30)] + [(f"v{i}", "validation") for i in range(4)]
    (places,), _ = placed(documents)
    assert Counter(kind for _, kind, _ in places) == {"train": 30, "validation": 4}


def test_the_sample_is_training_text_shared_by_weight_whatever_the_order(monkeypatch):
    monkeypatch.setattr(split, "SAMPLE_BYTES", 4000)
    first, second = [f"first {i:04}" for i in range(3000)], [f"second {i:04}" for i in range(3000)]
    places, found = placed(first, second, weights=[3.0, 1.0])
    sizes = Counter()
    for text in found.sample:
        sizes[text.split()[0]] += len(text)
    assert abs(sizes["first"] - 3000) < 30 and abs(sizes["second"] - 1000) < 30
    training = {place[0] for source in places for place in source if place and place[1] == "train"}
    assert training.issuperset(found.sample)
    _, reverse = placed(first[::-1], second[::-1], weights=[3.0, 1.0])
    assert reverse.sample == found.sample


def test_the_sample_of_a_long_stream_is_that_of_least_hash(monkeypatch):
    monkeypatch.setattr(split, "SAMPLE_BYTES", 400_000)
    texts = [f"{i:06}" * 100 for i in range(6000)]
    _, found = placed(texts)
    hashes = {t: int.from_bytes(split.hashlib.blake2b(t.encode(), digest_size=8).digest(), "little") for t in texts}
    training = sorted((h, t) for t, h in hashes.items() if split._draw_split(h) == "train")
    assert found.sample == [t for _, t in training[: len(found.sample)]]
    assert 400_000 <= sum(map(len, found.sample)) <= 401_000


@pytest.mark.parametrize(
    "documents, message",
    [
        ([], "s0: the corpus is empty"),
        ([" ", ""], "the corpus is empty"),
        (["a", "b"], "2 documents, too few"),
        (["a"], "1 document, "),
    ],
)
def test_too_little_text(documents, message):
    with pytest.raises(UserError, match=message):
        placed(documents)
