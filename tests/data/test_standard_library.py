import pydoc_data.topics

import pytest

from sparse_lm.data.standard_library import StandardLibrary
from sparse_lm.errors import UserError


def test_about_ten_megabytes_of_source_text_and_the_topics_held_out():
    documents = list(StandardLibrary().documents())
    heldout = {d.text for d in documents if d.kind == "heldout_domain"}
    rest = [d.text for d in documents if not d.kind]
    assert heldout == set(pydoc_data.topics.topics.values())
    assert 8e6 < sum(map(len, rest)) < 16e6
    assert any("class OrderedDict" in text for text in rest)
    topic = pydoc_data.topics.topics["lambda"]
    assert not any(topic[:200] in text for text in rest)


def library(folder, **files):
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return StandardLibrary(folder)


def test_tests_other_packages_and_other_encodings_are_left_out(tmp_path):
    files = {"a": b"a = 1", "test__b": b"b", "site-packages__c": b"c", "email__test__d": b"d", "latin": b"# \xe4"}
    assert [d.text for d in library(tmp_path, **files).documents()] == ["a = 1"]


def test_topics_are_found_in_another_layout_and_are_not_run(tmp_path):
    code = b"raise SystemExit\ntable: dict = {'x': 'first', 'y': 'sec' 'ond'}\nsmall = {'z': 'no'}\n"
    reader = library(tmp_path, pydoc_data__topics=code, a=b"a = 1")
    assert [tuple(d[:2]) for d in reader.documents()] == [
        ("first", "heldout_domain"),
        ("second", "heldout_domain"),
        ("a = 1", ""),
    ]


def test_without_topics_a_package_is_held_out(tmp_path):
    reader = library(tmp_path, email__a=b"mail = 1", b=b"b = 1", tkinter__c=b"c = 1")
    assert {d.text for d in reader.documents() if d.kind} == {"c = 1"}


def test_the_key_changes_with_the_text(tmp_path):
    reader = library(tmp_path, a=b"a = 1")
    before = reader.fingerprint()
    assert reader.fingerprint() == before
    (tmp_path / "a.py").write_text("a = 2")
    assert reader.fingerprint() != before


def test_a_python_without_its_source_text(tmp_path):
    with pytest.raises(UserError, match="no source text of its standard library"):
        StandardLibrary(tmp_path).fingerprint()
