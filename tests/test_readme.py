"""The Python of the README runs as it is printed."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_the_lines_of_python_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    exec(block, {})
    loss, *_, parameters = capsys.readouterr().out.strip().splitlines()
    assert 2 < float(loss) < 8 and int(parameters) > 10**5
