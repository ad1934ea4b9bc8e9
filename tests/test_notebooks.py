"""The notebooks run from their first cell to their last, on a small comparison."""

import json
import pathlib

import matplotlib
import pytest

from sparse_lm import runs
from sparse_lm.command_line import load_config
from sparse_lm.scaling.compare import compare
from tests import commands

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    matplotlib.use("agg")
    config = load_config(str(commands.write_config(tmp_path)))
    compare(config, runs.train, str(tmp_path / "runs/compare-quickstart"))
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {}
    for cell in json.loads(notebook.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert len(names["runs"]) == 2
