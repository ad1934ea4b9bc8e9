import gc
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.errors import UserError
from sparse_lm.runs import checkpoints as checkpoints_module
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.quiet import quiet_orbax
from tests.commands import free_port
from tests.runs.saved import ITEMS, abstract, flip, same, shifted


@pytest.fixture(scope="module", autouse=True)
def quiet():
    with quiet_orbax():
        yield
        gc.collect()  # what Orbax left behind after a fault


def run(code: str, *arguments, devices: int = 1, check: bool = True, **more) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=check, timeout=300, **more)


def test_comes_back_as_it_was(two):
    checkpoints = Checkpoints(two)
    step, items = checkpoints.restore(abstract(ITEMS))
    assert step == 2 and same(items, shifted(2))
    assert isinstance(items["position"]["batch"], np.ndarray)
    assert checkpoints.meta(2) == {"at": 2}
    assert same(checkpoints.restore(abstract(ITEMS), step=1)[1], shifted(1))


def test_reads_only_the_items_named(two):
    for item in ("optimizer", "position"):
        (two / "2" / item).rename(two / f"hidden {item}")
    wanted = {"params": abstract(ITEMS["params"]), "router": {}}
    step, items = Checkpoints(two).restore(wanted)
    assert step == 2 and set(items) == {"params", "router"} and same(items["params"], shifted(2)["params"])


def test_arrays_may_be_donated_once_save_returns(tmp_path):
    step = jax.jit(lambda a: a + 1, donate_argnums=0)
    array = jnp.zeros((512, 1024))
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for n in range(5):
            checkpoints.save(n, {"params": {"w": array}}, {})
            for _ in range(20):
                array = step(array)
    wanted = {"params": {"w": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}}
    for n in range(5):
        assert np.all(Checkpoints(tmp_path).restore(wanted, step=n)[1]["params"]["w"] == 20 * n)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = [None, 3.0, 1.0, 2.0, None, float("nan"), 0.5, 4.0, 4.0, 4.0]
    kept = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in enumerate(losses):
            checkpoints.save(step, {"params": {"w": jnp.ones(3)}}, {}, loss)
            checkpoints.wait()
            kept.append(checkpoints.steps())
    assert kept == [[0], [0, 1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7], [6, 7, 8], [6, 8, 9]]
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # another process knows the losses too
        checkpoints.save(10, {"params": {"w": jnp.ones(3)}}, {}, 0.7)
    assert checkpoints.steps() == [6, 10]


def test_nothing_is_deleted_in_a_folder_that_another_has_taken_over(tmp_path):
    lost = ""
    with Checkpoints(tmp_path, keep=1, lost=lambda: lost) as checkpoints:
        checkpoints.save(1, shifted(1), {})
        checkpoints.save(2, shifted(2), {})
        checkpoints.wait()
        assert checkpoints.steps() == [2]
        checkpoints.save(3, shifted(3), {})
        lost = "taken over"
        theirs = tmp_path / "4.orbax-checkpoint-tmp"
        theirs.mkdir()
        checkpoints.wait()
        checkpoints._failed(OSError("the store does not answer"))
    assert checkpoints.steps() == [2, 3] and theirs.exists()


def test_an_unknown_step_is_answered_with_those_there(two):
    for ask in (lambda c: c.restore({}, step=7), lambda c: c.meta(7)):
        with pytest.raises(UserError, match="no checkpoint 7 .*there are: 1, 2"):
            ask(Checkpoints(two))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"scale": jnp.ones((2,))}, r"array params/scale is float32\[\], not float32\[2\]"),
        ({"scale": jnp.int32(1)}, r"array params/scale is float32\[\], not int32\[\]"),
        ({"more": jnp.ones(1)}, "no array params/more"),
        ({"layers.0": {"w": jnp.ones((3, 4))}}, "an unexpected array params/layers.0/b"),
    ],
)
def test_other_arrays_than_asked_for_are_named(two, params, words):
    wanted = abstract({"params": ITEMS["params"] | params})
    with pytest.raises(UserError, match=f"checkpoint 2 .*{words}"):
        Checkpoints(two).restore(wanted)


def test_a_missing_item_and_another_schema_are_named(two, capfd):
    with pytest.raises(UserError, match="none of the checkpoints"):
        Checkpoints(two).restore({"ema": {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}})
    assert "checkpoint 2" in (err := capfd.readouterr().err) and "no item 'ema'" in err
    with pytest.raises(UserError, match="schema 1; this version reads 2"):
        Checkpoints(two, schema=2).restore({})


def test_an_item_without_arrays_need_not_be_there(two):
    """Versions before it was added saved none."""
    assert Checkpoints(two).restore({"ema": {}, "router": {}}) == (2, {"ema": {}, "router": {}})


def test_arrays_under_old_names_are_found_and_checked(two):
    optimizer = (abstract(ITEMS["optimizer"][1]), abstract(ITEMS["optimizer"][0]))  # in the other order
    wanted = {"optimizer": optimizer, "position": abstract(ITEMS["position"])}
    old_names = {"optimizer": (("1/", "0/"), ("0", "1"))}
    step, items = Checkpoints(two).restore(wanted, old_names=old_names)
    assert step == 2 and same(items["optimizer"], shifted(2)["optimizer"][::-1])
    new_ones = {"params": (("scale", "none"), ("layers.0/w", "layers.0/b"))}  # which are there under their own names
    assert same(Checkpoints(two).restore(abstract(ITEMS), old_names=new_ones)[1], shifted(2))
    with pytest.raises(UserError, match="checkpoint 2 .*array optimizer/0"):
        Checkpoints(two).restore(wanted)
    flip(two / "2", "optimizer", "1/mu")
    with pytest.raises(UserError, match="array optimizer/0/mu has changed"):
        Checkpoints(two).restore(wanted, 2, old_names)


def test_items_are_identified_by_what_they_hold(two, tmp_path_factory):
    with Checkpoints(tmp_path_factory.mktemp("again")) as again:
        again.save(7, shifted(2), {"at": "another time"}, loss=3.0)
        again.wait()
        one, two_ = Checkpoints(two).identify(2, ("params", "router")), again.identify(7, ("params", "router"))
    assert one == two_ != Checkpoints(two).identify(1, ("params", "router"))
    assert one != Checkpoints(two).identify(2, ("params",))
    with pytest.raises(UserError, match="no checkpoint 5 .*there are: 1, 2"):
        Checkpoints(two).identify(5, ("params",))


def test_going_back_drops_what_comes_after(two):
    with Checkpoints(two, keep=2) as checkpoints:
        checkpoints.save(3, shifted(3), {})
    with Checkpoints(two, keep=2) as checkpoints:
        checkpoints.restore(abstract(ITEMS), step=2)
        checkpoints.save(2, shifted(9), {})  # already there
    assert checkpoints.steps() == [2]
    assert same(Checkpoints(two).restore(abstract(ITEMS))[1], shifted(2))


def test_a_reader_lists_again_when_a_trainer_has_deleted_what_it_found(two, monkeypatch):
    reader = Checkpoints(two)
    load = checkpoints_module._load

    def load_slowly(path, wanted):
        if path.parent.name in ("1", "2"):  # deleted while it is read, after newer ones were saved
            with Checkpoints(two, keep=1) as trainer:
                trainer.save(3, shifted(3), {})
        return load(path, wanted)

    monkeypatch.setattr(checkpoints_module, "_load", load_slowly)
    step, items = reader.restore(abstract(ITEMS))
    assert step == 3 and same(items, shifted(3))


KILLED = """
import sys, jax.numpy as jnp
from sparse_lm.runs.checkpoints import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
array = jnp.arange(2_000_000.0)
for step in range(1, 10**6):
    checkpoints.save(step, {"params": {"w": array + step}}, {})
"""


def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    wanted = {"params": {"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)}}
    for kill in range(2):
        folder = tmp_path / str(kill)
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=os.environ | {"JAX_PLATFORMS": "cpu"})
        while not (child.poll() is None and any("tmp" in p.name for p in folder.glob(f"{3 + kill}.*"))):
            time.sleep(0.001)
            assert child.poll() is None
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert any("tmp" in p.name for p in folder.iterdir())
        with Checkpoints(folder) as checkpoints:
            step, items = checkpoints.restore(wanted)
            assert step == checkpoints.steps()[-1] >= 2
            assert np.array_equal(items["params"]["w"], np.arange(2_000_000, dtype=np.float32) + step)
            checkpoints.save(step + 1, items, {})
        assert not any("tmp" in p.name for p in folder.iterdir())


FULL = """
import resource, sys, jax.numpy as jnp, numpy as np
from sparse_lm.errors import UserError
from sparse_lm.runs.checkpoints import Checkpoints
from sparse_lm.runs.quiet import quiet_orbax
quiet = quiet_orbax()
quiet.__enter__()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
arrays = {str(i): jnp.asarray(np.random.default_rng(i).random(100_000, np.float32)) for i in range(8)}
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": {"w": jnp.ones(10)}}, {})
checkpoints.save(2, {"params": arrays}, {})
try:
    checkpoints.wait() if sys.argv[2] == "wait" else checkpoints.save(3, {"params": {"w": jnp.ones(10)}}, {})
except UserError as error:
    print(error)
print(checkpoints.steps())
"""


@pytest.mark.parametrize("at", ["wait", "save"])
def test_a_full_disk_is_told_in_one_line(tmp_path, at):
    result = run(FULL, tmp_path, at)
    assert result.stdout == f"the disk is full: a checkpoint could not be written to {tmp_path}\n[1]\n"
    assert result.stderr == ""


def test_too_little_room_is_told_before_anything_is_written(two, monkeypatch):
    usage = type("usage", (), {"free": 100_000})
    monkeypatch.setattr("sparse_lm.runs.checkpoints.shutil.disk_usage", lambda path: usage)
    with Checkpoints(two) as checkpoints:
        with pytest.raises(UserError, match=r"disk is full: checkpoint 3 .* needs 0.4 MB, 0.1 MB are free"):
            checkpoints.save(3, {"params": {"w": jnp.ones(100_000)}}, {})
    assert sorted(p.name for p in two.iterdir()) == ["1", "2"]


ELSEWHERE = """
import sys, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sparse_lm.runs.checkpoints import Checkpoints
if len(sys.argv) > 2:
    jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]))
mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
def where(spec, shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
wanted = {"params": {"w": where(P("x", "y"), (8, 6)), "b": where(P(), (3,)), "none": where(P("x"), (0, 2))},
          "router": {}, "position": {"batch": jax.ShapeDtypeStruct((), jnp.int32)}}
with Checkpoints(sys.argv[1]) as checkpoints:
    step, items = checkpoints.restore(wanted)
    assert items["params"]["w"].sharding == wanted["params"]["w"].sharding
    checkpoints.save(step + 1, jax.tree.map(lambda a: a + 1, items), {"devices": jax.device_count()})
"""


def test_restores_onto_another_mesh_and_another_number_of_processes_and_back(tmp_path):
    params = {"w": jnp.arange(48.0).reshape(8, 6), "b": jnp.ones(3), "none": jnp.zeros((0, 2))}
    items = {"params": params, "router": {}, "position": {"batch": np.int32(1)}}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        checkpoints.save(1, items, {})
    run(ELSEWHERE, tmp_path, devices=8)
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), address]
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    pair = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    ends = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], ends
    step, found = Checkpoints(tmp_path).restore(abstract(items))
    assert step == 3 and same(found, jax.tree.map(lambda a: a + 2 if a.dtype == np.float32 else a + np.int32(2), items))
    assert Checkpoints(tmp_path).meta(3) == {"devices": 8}


def test_meta_comes_back_with_infinity_and_keys_as_text(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {}, {"factor": float("inf"), "pair": (1, 2), "by": {2: "b", 10: "a"}})
    assert Checkpoints(tmp_path).meta(1) == {"factor": float("inf"), "pair": [1, 2], "by": {"2": "b", "10": "a"}}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({}) == (1, {})
