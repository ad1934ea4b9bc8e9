import struct
import subprocess
import sys

import pytest

from sparse_lm.errors import UserError
from sparse_lm.scaling import report
from sparse_lm.scaling.compare import compare
from tests.scaling.fabricated import Trainer, config

FILES = {"comparison.json", "comparison.md", "comparison.png"}


def shifted(sparse, seeds=0.01):
    """A sparse model with another loss than the dense one, and seeds that differ."""
    return lambda c, split, step: 5 - step / 50 + (sparse + seeds * c.training.seed) * (c.model.experts > 0)


@pytest.mark.parametrize(
    ("sparse", "seeds", "said", "unsaid"),
    [
        (-0.5, 3, "validation: the sparse model is better.", ["worse", "no difference seen"]),
        (0.5, 3, "validation: the sparse model is worse.", ["better", "no difference seen"]),
        (-0.01, 3, "validation: no difference seen between", ["better", "worse"]),
        (-0.5, 1, "validation: one seed: not judged.", ["better", "worse", "no difference seen"]),
    ],
)
def test_words_follow_the_verdict(tmp_path, sparse, seeds, said, unsaid):
    result = compare(config(), Trainer(shifted(sparse)), str(tmp_path), seeds=seeds)
    for text in (report.format_summary(result), (tmp_path / "comparison.md").read_text()):
        assert said in text
        assert not [word for word in unsaid if word in text]


def test_the_report_has_the_numbers(tmp_path):
    compare(config(), Trainer(shifted(-0.5)), str(tmp_path), seeds=3, price_per_hour=7200.0)
    text = (tmp_path / "comparison.md").read_text()
    assert "| validation loss, nats per token | 3.0000 (3.0000 to 3.0000) | 2.5100 (2.4852 to 2.5348) |" in text
    assert "-0.4900 nats per token (95 % interval -0.5148 to -0.4652; 3 seeds)." in text
    assert "| seconds of training | 10.0 (10.0 to 10.0) |" in text and "| cost of one run | 20.00" in text
    assert "times fewer steps" in text and "![" in text and "| model.experts | 0 | 4 |" in text


def test_more_steps_are_said_so():
    assert report._format_ratio(1.5) == "1.50 times fewer" and report._format_ratio(0.5) == "2.00 times as many"


def test_the_terminal_text_fits(tmp_path):
    result = compare(config(), Trainer(shifted(-0.5)), str(tmp_path), seeds=3)
    assert max(map(len, report.format_summary(result).splitlines())) <= 140


def test_three_whole_files_are_left(tmp_path):
    compare(config(), Trainer(shifted(-0.5)), str(tmp_path), seeds=2)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == FILES
    png = (tmp_path / "comparison.png").read_bytes()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (1500, 630)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    compare(config(), Trainer(shifted(-0.5)), str(tmp_path))
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fail(*_):
        raise UserError("no space")

    monkeypatch.setattr(report, "format_markdown", fail)
    with pytest.raises(UserError):
        compare(config(), Trainer(shifted(0.5)), str(tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_matplotlib_is_imported_only_to_draw():
    script = "import sys, sparse_lm.scaling.compare; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
