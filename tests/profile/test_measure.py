"""A real profile of a small model: its parts add up, and what is asked of them is there."""

import pytest

from sparse_lm.cost import count_flops, optimizer_flops
from sparse_lm.errors import UserError
from sparse_lm.profile import measure, profile_steps, profile_table
from sparse_lm.profile.measure import flops_by_part
from sparse_lm.profile.program import PARTS
from tests import tiny

FIELDS = dict(model__experts=4, model__width=64, model__ffn_width=128, data__length=64, training__batch=8, mesh__data=1)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace")
    config = tiny.config(**FIELDS)
    return config, folder, profile_steps(config, steps=3, trace=f"{folder}/new")


def test_parts_add_up_to_a_step(profiled):
    _, _, seen = profiled
    assert sum(row.seconds for row in seen.rows) + seen.idle == pytest.approx(seen.step, rel=0.02)
    assert -0.02 * seen.step < seen.idle < 0.5 * seen.step


def test_every_part_takes_time_forward_and_backward(profiled):
    _, _, seen = profiled
    rows = {row.part: row for row in seen.rows}
    for part in ("attention", "feed_forward", "router", "experts", "output"):
        assert rows[part].forward > 0 and rows[part].backward > 0 and rows[part].bytes > 0
    assert rows["optimizer"].seconds > 0 and rows["optimizer"].backward == 0
    assert rows["rest"].seconds < 0.5 * seen.step


def test_the_roofline_is_the_later_of_both_bounds(profiled):
    _, _, seen = profiled
    for row in seen.rows:
        assert seen.roofline(row) >= row.flops / seen.machine.float32
        assert seen.roofline(row) >= row.bytes / seen.machine.bandwidth
    assert 1e9 < seen.machine.float32 < 1e14 and 1e8 < seen.machine.bandwidth < 1e13


def test_the_trace_is_left_for_viewers(profiled):
    _, folder, _ = profiled
    assert list(folder.glob("new/plugins/profile/*/*.xplane.pb"))


def test_the_table_fits_a_terminal(profiled):
    _, _, seen = profiled
    text = profile_table(seen)
    assert max(map(len, text.splitlines())) <= 110
    first = [line.split("  ")[0] for line in text.splitlines()]
    for name in ("attention", "router", "dispatch", "experts", "combine", "output and loss", "optimizer"):
        assert name in first
    assert first[-1].startswith("Largest gap") or first[-2].startswith("Largest gap")


@pytest.mark.parametrize("fields", [{}, dict(model__executor="einsum"), dict(model__experts=0, model__remat="full")])
def test_flops_of_the_parts_are_all_flops_but_the_work_per_element(fields):
    config = tiny.config(**FIELDS | fields)
    counted = flops_by_part(config)
    parts = count_flops(config.model, config.data.length).parts
    tokens = config.training.batch * config.data.length
    products = tokens * sum(part.training for part in parts if part.name != "elementwise")
    assert sum(counted[part] for part in PARTS) == pytest.approx(products + optimizer_flops(config))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps):
    with pytest.raises(UserError, match=f"--steps is {steps}; at least 1"):
        profile_steps(tiny.config(), steps=steps)


@pytest.mark.parametrize("inside", ["", "/more/folders"])
def test_a_file_for_a_folder_is_refused(tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; it has to be a folder"):
        profile_steps(tiny.config(), trace=f"{tmp_path}/file{inside}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_devices_of_one_machine_share_its_peaks(monkeypatch):
    monkeypatch.setattr(measure, "_shortest_run", lambda function, value, rounds: 0.5)
    assert measure.measure_machine(4).float32 == 2 * 1024**3 / 0.5 / 4
    assert measure.measure_machine(4).bandwidth == 2 * 4 * 2**26 / 0.5 / 4
