import runpy
from pathlib import Path

import pytest

from sparse_lm import config as configs
from sparse_lm import cost
from sparse_lm.cost.info import format_quantity, format_ranges

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0, "", "0"),
        (999, "B", "999 B"),
        (999.6, "B", "1.00 kB"),
        (1.571e12, "", "1.57 T"),
        (223e6, "", "223 M"),
        (9.995e9, "", "10.0 B"),
        (12.34e9, "B", "12.3 GB"),
    ],
)
def test_human_shows_three_digits(value, unit, shown):
    assert format_quantity(value, unit) == shown


@pytest.mark.parametrize(
    ("numbers", "shown"),
    [([0], "0"), ([0, 1, 2], "0–2"), ([1, 3, 5, 7], "1, 3 … 7"), ([0, 1, 3, 5], "0–1, 3, 5"), ([1, 3], "1, 3")],
)
def test_ranges_are_short(numbers, shown):
    assert format_ranges(numbers) == shown


def test_a_trillion_parameters_are_arithmetic():
    config = configs.resolve(runpy.run_path(str(CONFIGS / "switch_c.py"))["get_config"]())
    text = cost.info_table(config)
    assert text.startswith("switch_c: 1.57 T parameters, 1.54 B active per token")
    assert "2048 × 25.6 M" in text and "12.6 TB" in text and "data 1 × fsdp 1 × expert 256 × tensor 2" in text


def test_alike_layers_share_a_row_and_no_row_is_ragged():
    model = configs.Model(layers=7, dense_first=1, expert_every=2, experts=4, expert_width=256)
    lines = cost.info_table(configs.resolve(configs.Config(model=model))).splitlines()
    rows = [line.split("  ")[0] for line in lines[lines.index(next(r for r in lines if r.startswith("layers"))) :]]
    assert rows[1:5] == ["embedding", "0–1, 3, 5", "2, 4, 6", "output (tied)"]
