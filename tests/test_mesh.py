import dataclasses
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparse_lm import config as configs
from sparse_lm.errors import UserError
from sparse_lm.mesh import constrain, make_mesh, partition_spec
from sparse_lm.models import functional
from sparse_lm.routing import ROUTERS
from sparse_lm.step.fit import check_fit
from tests import tiny
from tests.eight_devices import MESHES, OVERFLOWING, SOME_MESHES

RUNS = [f"gather, {name}" for name in MESHES]
RUNS += [f"{executor}, {name}" for executor in ("einsum", "grouped") for name in SOME_MESHES]
E, C, D, F, GROUPS = 8, 3, 16, 32, 8  # of the model in eight_devices.py


def on_eight_devices(module, timeout, *arguments):
    """What a module prints, and its stderr."""
    flags = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    root = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-W", "error", "-m", module, *arguments]
    done = subprocess.run(command, cwd=root, env=os.environ | flags, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def eight():
    return on_eight_devices("tests.eight_devices", 900)


@pytest.fixture(scope="module")
def trained(eight):
    found, stderr = eight
    return found["runs"], stderr


def test_meshes_of_one_axis_or_two_agree_with_one_device():
    found, stderr = on_eight_devices("tests.routers_on_meshes", 900, "axes")
    assert "nvoluntary full rematerialization" not in stderr, stderr
    assert len(found) == 6
    assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


@pytest.mark.slow
def test_every_router_and_executor_agrees_with_one_device():
    found, stderr = on_eight_devices("tests.routers_on_meshes", 3600)
    assert "nvoluntary full rematerialization" not in stderr, stderr
    assert {name.split(",")[0] for name in found} == set(ROUTERS)
    assert {name: difference for name, difference in found.items() if difference > 1e-5} == {}


@pytest.mark.parametrize("run", RUNS)
def test_every_mesh_and_executor_has_the_loss_curve_of_one_device(trained, run):
    found, _ = trained
    one = found["one"]["losses"]
    assert len(one) == 20 and one[-1] < one[0] - 0.1
    np.testing.assert_allclose(found[run]["losses"], one, rtol=1e-5)


def test_nothing_is_replicated_for_want_of_a_better_way(trained):
    _, stderr = trained
    assert "nvoluntary full rematerialization" not in stderr, stderr


@pytest.mark.parametrize("run", RUNS)
def test_a_step_compiles_once(trained, run):
    result = trained[0][run]
    assert result["compilations"] == (0 if result["program"] else 1)  # 0: compiled ahead


@pytest.mark.parametrize("run", RUNS)
def test_experts_and_their_moments_are_divided(trained, run):
    sizes = MESHES[run.split(", ", 1)[1]]
    part = [1, E // sizes.get("expert", 1), D // sizes.get("fsdp", 1), F // sizes.get("tensor", 1)]
    assert trained[0][run]["shards"] == {"weights": part, "mu": part, "nu": part}


@pytest.mark.parametrize(
    "run", [run for run in RUNS if "grouped" not in run and ("expert 8" in run or "data 2" in run and "expert" in run)]
)
def test_tokens_travel_to_the_devices_of_their_experts(trained, run):
    """In the compiled program: all-to-alls among the devices of the expert axis of rows for E / expert experts of each
    device's groups, and products of E / expert experts with the groups of all those devices."""
    program = trained[0][run]["program"]
    expert = MESHES[run.split(", ", 1)[1]]["expert"]
    sent = 0
    for line in program.splitlines():
        if result := re.search(r" = \((.*)\) all-to-all\(", line):
            parts = re.findall(r"f32\[([\d,]+)\]", result[1])
            sizes = {math.prod(map(int, part.split(","))) for part in parts}
            sent += len(parts) == expert and sizes == {E // expert * GROUPS // 8 * C * D}
    assert sent >= 2
    dots = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program)
    products = [tuple(int(n) for n in dims.split(",") if n != "1") for dims in dots]
    rows = GROUPS // (8 // expert) * C
    assert ((rows, F) if expert == E else (E // expert, rows, F)) in products
    assert (E, GROUPS // 8 * C, F) not in products


@pytest.mark.parametrize("mesh", OVERFLOWING)
def test_what_finds_no_room_on_the_device_of_its_expert_is_dropped_and_counted(eight, mesh):
    found = eight[0]["overflows"][mesh]
    assert 0 < found["dropped"] == found["counted"] < found["choices"]
    assert found["tokens without output"] > 0 and found["their output"] == 0
    assert found["difference"] < 1e-5  # to one device without what is dropped, in values and gradients


def test_the_region_of_a_device_is_the_groups_that_it_holds(eight):
    found = eight[0]["regions"]
    assert len(found["held"]) == 4 and found["found"] == found["held"]


def test_each_device_drops_hidden_units_of_its_own(eight):
    assert eight[0]["dropout masks"] == 8


def test_the_rest_of_the_devices_is_filled_in():
    devices = jax.devices()[:1] * 8
    mesh = make_mesh(configs.Mesh(data=-1, expert=4), devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 4


@pytest.mark.parametrize(
    "sizes, words",
    [
        ({"data": 3}, "mesh.data=3, mesh.fsdp=1, mesh.expert=1, mesh.tensor=1 needs 3 devices; there are 8"),
        ({"expert": 3}, "needs a multiple of 3 devices; there are 8"),
        ({"data": 16}, "needs 16 devices; there are 8"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"tensor": 0}, "each must be at least 1"),
        ({"tensor": -2}, "each must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_mesh(configs.Mesh(**sizes), jax.devices()[:1] * 8)


@pytest.mark.parametrize(
    "fields, sizes, words",
    [
        ({"training__batch": 12}, {}, "training.batch / training.accumulation is 12,.*mesh.data=8.* nearest .* (8|16)"),
        ({"training__accumulation": 4}, {}, "training.batch / training.accumulation is 4,.* nearest .* 8"),
        ({"model__experts": 6}, {"expert": 4}, "model.experts is 6, .*mesh.expert=4.* nearest .* 8"),
        ({"model__kv_heads": 2}, {"tensor": 4}, "model.kv_heads is 2, .*mesh.tensor=4.* nearest .* 4"),
        ({"model__ffn_width": 30}, {"tensor": 4}, "model.ffn_width is 30, .*mesh.tensor=4.* nearest .* 3[2]"),
        ({"model__expert_width": 30}, {"tensor": 4}, "model.expert_width is 30, .*mesh.tensor=4.* nearest .* 3[2]"),
        ({"model__width": 20}, {"fsdp": 8}, "model.width is 20, .*mesh.fsdp=8.* nearest .* (16|24)"),
        ({"model__vocabulary": 60}, {"tensor": 8}, "model.vocabulary is 60, .*mesh.tensor=8.* nearest .* 64"),
        ({"model__experts": 4, "model__group_size": 64}, {}, "routing groups .* is 4, .*mesh.data=8.* nearest .* 8"),
    ],
)
def test_a_size_that_the_mesh_does_not_divide_is_refused_with_the_nearest(fields, sizes, words):
    base = {"training__batch": 16, "model__heads": 4, "model__head_width": 4}
    if "tensor" in sizes and "model__kv_heads" not in fields:
        base |= {"model__heads": 8, "model__kv_heads": 8}
    config = tiny.config(**base | fields)
    mesh = make_mesh(configs.Mesh(**sizes), jax.devices()[:1] * 8)
    with pytest.raises(UserError, match=words) as error:
        check_fit(config, mesh, functional(config.model))
    assert "\n" not in str(error.value)


def test_a_config_that_fits_is_accepted():
    config = tiny.config(training__batch=16, model__experts=8)
    check_fit(
        config,
        make_mesh(configs.Mesh(fsdp=2, expert=2, tensor=2, data=1), jax.devices()[:1] * 8),
        functional(config.model),
    )


def test_axes_of_arrays_become_axes_of_the_mesh():
    assert partition_spec("experts", "width", "hidden") == PartitionSpec(("expert",), ("fsdp",), ("tensor",))
    assert partition_spec("batch", None, "norm") == PartitionSpec(("data", "fsdp", "expert"), None, None)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones(3)
    assert constrain(x, "batch") is x


def test_every_axis_of_the_mesh_can_be_set():
    assert {field.name for field in dataclasses.fields(configs.Mesh)} == {"data", "fsdp", "expert", "tensor"}
