import pathlib

import pytest
from etils import epath

from sparse_lm.errors import UserError
from sparse_lm.paths import user_path


def test_every_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/x") == epath.Path("/somewhere/x")
    assert user_path("x/y") == tmp_path / "x/y"
    assert user_path(pathlib.Path("/x")) == epath.Path("/x")
    assert str(user_path("gs://bucket/x")) == "gs://bucket/x"
    assert user_path(user_path("~/x")) == user_path("~/x")


@pytest.mark.parametrize(
    "path, words", [("bad://x", "bad:// is no store that can be used; gs, s3, az"), ("~no_such_user/x", "set HOME")]
)
def test_what_leads_nowhere_is_refused(path, words):
    with pytest.raises(UserError, match=words):
        user_path(path)
