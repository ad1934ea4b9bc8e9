import multiprocessing
import time

import pytest
from etils import epath

from sparse_lm.data.cache import atomic_path, file_lock


def test_the_folder_is_there_only_when_it_is_whole(tmp_path):
    final = epath.Path(tmp_path) / "rows"
    with atomic_path(final) as path:
        path.mkdir()
        (path / "a").write_text("1")
        assert not final.exists()
    assert [p.name for p in final.iterdir()] == ["a"]
    assert [p.name for p in epath.Path(tmp_path).iterdir()] == ["rows"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path, error):
    with pytest.raises(error), atomic_path(epath.Path(tmp_path) / "rows") as path:
        path.mkdir()
        (path / "a").write_text("1")
        raise error
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    final = epath.Path(tmp_path) / "rows"
    left = atomic_path(final)
    left.__enter__().mkdir()  # never left, like a process that is killed
    assert len(list(tmp_path.iterdir())) == 1
    with atomic_path(final) as path:
        path.write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def test_the_first_of_two_is_kept(tmp_path):
    final = epath.Path(tmp_path) / "rows"
    with atomic_path(final) as path:
        path.mkdir()
        (path / "late").write_text("2")
        final.mkdir()
        (final / "early").write_text("1")
    assert [p.name for p in final.iterdir()] == ["early"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows"]


def hold(path, held, seconds):
    with file_lock(path):
        held.set()
        time.sleep(seconds)
        path.with_name("done").touch()


def test_a_second_process_waits_for_the_first(tmp_path):
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=hold, args=(epath.Path(tmp_path) / "lock", held, 0.5))
    process.start()
    assert held.wait(60)
    with file_lock(epath.Path(tmp_path) / "lock"):
        assert (tmp_path / "done").exists()
    process.join()
