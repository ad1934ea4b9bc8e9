"""Where a run's mesh does not fit the devices, its parameters are divided over them as well as can be."""

import itertools
import math

import jax
import pytest

from sparse_lm import config as configs
from sparse_lm.errors import DoesNotFit, UserError
from sparse_lm.mesh import AXES, make_mesh
from sparse_lm.runs.devices import build_here
from sparse_lm.step.build import build
from tests import tiny

SIZES = {"model__experts": 8, "model__kv_heads": 4, "training__batch": 8, "model__router": tiny.switch()}


@pytest.fixture(autouse=True)
def eight(monkeypatch):
    """Eight devices, as far as programs are built and not run."""
    devices = jax.devices()[:1] * 8
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: len(devices))


def made(mesh: configs.Mesh, **fields) -> configs.Config:
    return tiny.config(**SIZES | {f"mesh__{axis}": getattr(mesh, axis) for axis in AXES} | fields)


def sizes(program) -> dict[str, int]:
    return dict(program.mesh.shape)


def held(program) -> int:
    """Bytes of parameters on each device."""
    leaves = jax.tree.leaves(program.abstract_state.parameters)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def best(config) -> tuple[dict[str, int], int]:
    """By trying: the mesh of eight that leaves each device the fewest bytes, and how many; first the most fsdp, …"""
    found = []
    for shape in itertools.product((1, 2, 4, 8), repeat=4):
        if math.prod(shape) == 8:
            mesh = dict(zip(AXES, shape))
            try:
                program = build(config, make_mesh(configs.Mesh(**mesh)))
            except DoesNotFit:
                continue
            found.append((held(program), -mesh["fsdp"], -mesh["expert"], -mesh["tensor"], mesh))
    bytes_held, *_, mesh = min(found, key=lambda one: one[:4])
    return mesh, bytes_held


def test_the_runs_own_mesh_is_taken_where_it_fits(caplog):
    caplog.set_level("INFO", "sparse_lm")
    config = made(configs.Mesh(data=2, fsdp=2, expert=2))
    assert sizes(build_here(config)) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
    assert not caplog.messages
    # One that leaves each device all parameters is for training again, not for reading.
    copies = {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1}
    assert sizes(build_here(made(configs.Mesh()), keep_batch=True)) == copies
    assert sizes(build_here(made(configs.Mesh()))) == best(made(configs.Mesh()))[0] != copies


def test_one_that_is_asked_for_is_taken_or_refused():
    config = made(configs.Mesh(fsdp=16))
    program = build_here(config, configs.Mesh(data=1, expert=4, tensor=2))
    assert sizes(program) == {"data": 1, "fsdp": 1, "expert": 4, "tensor": 2}
    assert program.config.mesh == configs.Mesh(data=1, expert=4, tensor=2)
    with pytest.raises(DoesNotFit, match="needs 3 devices; there are 8"):
        build_here(config, configs.Mesh(data=3))
    with pytest.raises(DoesNotFit, match="model.kv_heads is 4"):
        build_here(config, configs.Mesh(data=1, tensor=8))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__width": 12, "model__head_width": 4, "model__heads": 4},  # no eight parts by width
        {"model__width": 9, "model__head_width": 4, "model__heads": 4, "model__vocabulary": 63},  # no two
        {"model__experts": 6},
        {"model__experts": 0},
        {"model__experts": 7, "model__width": 9, "model__head_width": 4, "model__vocabulary": 63, "model__kv_heads": 1,
         "model__ffn_width": 31},  # nothing can be divided
    ],
    ids=["all", "width 12", "width 9", "experts 6", "dense", "none"],
)  # fmt: skip
def test_otherwise_each_device_gets_as_few_bytes_as_can_be(caplog, fields):
    caplog.set_level("INFO", "sparse_lm")
    program = build_here(made(configs.Mesh(fsdp=16), **fields))
    mesh, fewest = best(made(configs.Mesh(), **fields))
    assert (sizes(program), held(program)) == (mesh, fewest)
    whole = held(build(made(configs.Mesh(), **fields), make_mesh(configs.Mesh(), jax.devices()[:1])))
    if fields.get("model__ffn_width") == 31:
        assert fewest == whole
    else:
        assert fewest < whole * 0.6
    misfit, chosen = caplog.messages
    assert misfit.startswith("the run's own mesh is not taken here: ") and "there are 8" in misfit
    assert f"each holds {fewest / 1e6:.1f} of the {whole / 1e6:.1f} MB of parameters" in chosen


def test_the_layers_are_divided():
    program = build_here(made(configs.Mesh(fsdp=16)))
    for leaf in jax.tree.leaves(program.abstract_state.parameters):
        parts = leaf.size // math.prod(leaf.sharding.shard_shape(leaf.shape))
        assert parts == (1 if leaf.ndim < 3 and 64 not in leaf.shape else 8)  # norms are whole


def test_a_batch_is_rounded_up_for_evaluation_and_stays_for_replay(caplog):
    caplog.set_level("INFO", "sparse_lm")
    fields = {"training__batch": 6, "training__accumulation": 2}
    config = made(configs.Mesh(data=3, fsdp=2), **fields)
    program = build_here(config)
    assert (program.config.training.batch, program.config.training.accumulation) == (8, 1)
    assert sizes(program)["fsdp"] == 8
    rows = {leaf.shape[0] for leaf in jax.tree.leaves(program.abstract_batch)}
    assert rows == {8}
    caplog.clear()
    # Three rows at once, which neither the width of 16 nor 8 experts can be divided by.
    program = build_here(config, keep_batch=True)
    assert sizes(program) == {"data": 3, "fsdp": 1, "expert": 1, "tensor": 2}
    assert program.config.training == config.training
    assert "on 6 of the 8 devices, the most that fit" in caplog.messages[1]


def test_groups_of_several_rows_stay_whole():
    config = made(configs.Mesh(data=1), model__group_size=48, training__batch=3)
    program = build_here(config, configs.Mesh(data=8))
    assert program.config.training.batch == 24  # three rows a group, a group on each device


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model__router": configs.choice("switch", jiter=0.1)}, "jiter.*did you mean 'jitter'"),
        ({"optimizer__algorithm": configs.choice("adam")}, "did you mean 'adamw'"),
        ({"mesh__fsdp": 0}, "must be at least 1"),
    ],
)
def test_other_mistakes_are_told(fields, words):
    with pytest.raises(UserError, match=words) as error:
        build_here(made(configs.Mesh(), **fields))
    assert not isinstance(error.value, DoesNotFit)
