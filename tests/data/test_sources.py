import pytest

from sparse_lm.data.folder import Folder
from sparse_lm.data.sources import parse_sources
from sparse_lm.data.standard_library import StandardLibrary
from sparse_lm.data.tfds_set import TfdsSet
from sparse_lm.errors import UserError


def test_options_are_read_from_the_query():
    folder, tfds, stdlib = parse_sources(
        (
            "folder:gs://b/my text?weight=0.5&field=body&heldout=de",
            "tfds:c4/en?max_epochs=4&data_dir=%2Fd%26e",
            "stdlib",
        )
    )
    assert folder.reader == Folder("gs://b/my text", field="body", heldout="de")
    assert (folder.weight, folder.max_epochs, folder.name) == (0.5, 0, "my_text")
    assert tfds.reader == TfdsSet("c4/en", data_dir="/d&e")
    assert (tfds.weight, tfds.max_epochs, tfds.name) == (1, 4, "c4_en")
    assert isinstance(stdlib.reader, StandardLibrary) and stdlib.name == "stdlib"


def test_sources_of_one_name_are_told_apart():
    assert [source.name for source in parse_sources(("folder:a/x", "folder:b/x", "folder:c/x"))] == ["x", "x_2", "x_3"]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("stdlb", "unknown kind 'stdlb'; did you mean 'stdlib'"),
        ("/my/folder", "a folder is written folder:/my/folder"),
        ("zzzzzzzz", "unknown kind 'zzzzzzzz'; valid: folder, stdlib, tfds"),
        ("stdlib:x", "it is written stdlib$"),
        ("folder", "it is written folder:PATH"),
        ("tfds:", "it is written tfds:NAME"),
        ("stdlib?wieght=2", "unknown option 'wieght'; did you mean 'weight'"),
        ("stdlib?field=text", "unknown option 'field'"),
        ("folder:x?heldout", "heldout has no value"),
        ("stdlib?weight=0", "weight is '0'; it must be a number above 0"),
        ("stdlib?weight=nan", "must be a number above 0"),
        ("stdlib?weight=inf", "must be a number above 0"),
        ("stdlib?max_epochs=1.5", "max_epochs is '1.5'; it must be a whole number above 0"),
        ("stdlib?max_epochs=0", "must be a whole number above 0"),
    ],
)
def test_a_source_that_is_none_is_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        parse_sources((spec,))
    assert repr(spec) in str(error.value) and "\n" not in str(error.value)


def test_no_source_at_all():
    with pytest.raises(UserError, match="data.sources is empty"):
        parse_sources(())
