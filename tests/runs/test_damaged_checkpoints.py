"""What is damaged, half there or another's: it is noticed, named, and left where it is not ours."""

import gc
import shutil

import pytest

from sparse_lm.errors import UserError
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.quiet import quiet_orbax
from tests.runs.saved import ITEMS, NAMES, abstract, flip, same, shifted


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with quiet_orbax():
        yield
        gc.collect()  # what Orbax left behind after a fault


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_is_noticed_in_every_array(two, capfd, name):
    item, array = name.split("/", 1)
    flip(two / "2", item, array)
    step, items = Checkpoints(two).restore(abstract(ITEMS))
    assert step == 1 and same(items, shifted(1))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(
        f"WARNING: checkpoint 2 in {two} can't be used: array {name} has changed"
    )
    with pytest.raises(UserError, match=f"checkpoint 2 .*array {name} has changed"):
        Checkpoints(two).restore(abstract(ITEMS), step=2)


@pytest.mark.parametrize("damage", ["cut", "gone", "flipped"])
def test_no_damaged_file_gives_wrong_arrays(two, capfd, damage):
    fallen_back = 0
    for path in sorted(p for p in (two / "2").rglob("*") if p.is_file()):
        sound = path.read_bytes()
        half = len(sound) // 2
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(sound[:half] + (b"" if damage == "cut" else bytes([sound[half] ^ 4]) + sound[half + 1 :]))
        step, items = Checkpoints(two).restore(abstract(ITEMS))
        err = capfd.readouterr().err
        assert same(items, shifted(step)), path
        if step == 1 and path.parts[-2:] != ("meta", "metadata"):
            assert err.count("\n") == 1 and "checkpoint 2" in err, (path, err)
        fallen_back += step == 1
        path.write_bytes(sound)
    assert fallen_back >= 5


def test_all_damaged_is_an_error_and_so_is_nothing_there(two):
    for step in ("1", "2"):
        flip(two / step, "params", "scale")
    with pytest.raises(UserError, match="none of the checkpoints .* can be used: 1, 2"):
        Checkpoints(two).restore(abstract(ITEMS))
    with pytest.raises(UserError, match="no complete checkpoint in .*elsewhere"):
        Checkpoints(two / "elsewhere").restore({})
    assert not (two / "elsewhere").exists()


def test_goes_on_behind_a_damaged_one_and_replaces_it(two):
    flip(two / "2", "params", "scale")
    with Checkpoints(two) as checkpoints:
        assert checkpoints.restore(abstract(ITEMS))[0] == 1
        assert checkpoints.steps() == [1, 2]  # reading changes nothing
        checkpoints.save(2, shifted(5), {})
    assert same(Checkpoints(two).restore(abstract(ITEMS))[1], shifted(5))


def test_half_deleted_and_half_written_ones_do_not_count_and_are_removed(two):
    (two / "1" / "meta" / "metadata").unlink()
    (two / "3.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (two / "notes").mkdir()
    assert Checkpoints(two).steps() == [2]
    with Checkpoints(two) as checkpoints:
        checkpoints.save(4, ITEMS, {})
    assert sorted(p.name for p in two.iterdir()) == ["2", "4", "notes"]


def test_what_others_put_beside_them_stays(two):
    mine = ["55.backup", "40.keep-this", "55.tar.gz", "007", "7.orbax", "-3", "v2"]
    for name in mine:
        (two / name).mkdir()
    (two / "9.orbax-checkpoint-tmp-1").mkdir()
    with Checkpoints(two, keep=1) as checkpoints:
        checkpoints.restore(abstract(ITEMS))
        checkpoints.save(8, ITEMS, {})
    assert sorted(path.name for path in two.iterdir()) == sorted([*mine, "8"])


def test_a_copy_under_another_step_is_not_taken_for_it(two, capfd):
    shutil.copytree(two / "1", two / "7")
    with Checkpoints(two) as checkpoints:
        assert checkpoints.restore(abstract(ITEMS))[0] == 2
        assert "checkpoint 7 in " in (said := capfd.readouterr().err) and "it is a copy of checkpoint 1;" in said
        with pytest.raises(UserError, match="checkpoint 7 in .* can't be used: it is a copy of checkpoint 1"):
            checkpoints.restore(abstract(ITEMS), step=7)
        checkpoints.save(7, shifted(7), {})
    assert same(Checkpoints(two).restore(abstract(ITEMS), step=7)[1], shifted(7))


@pytest.mark.parametrize("damage", ["emptied", "without meta"])
def test_what_is_passed_over_is_named(two, capfd, damage):
    shutil.rmtree(two / "2" / "meta") if damage == "without meta" else shutil.rmtree(two / "2")
    (two / "2").mkdir(exist_ok=True)
    assert Checkpoints(two).restore(abstract(ITEMS))[0] == 1
    assert f"WARNING: {two}/2 is passed over: it is no complete checkpoint" in capfd.readouterr().err
