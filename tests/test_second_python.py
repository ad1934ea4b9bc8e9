"""The main job runs on a newer Python with a newer jax."""

import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import commands

ROOT = pathlib.Path(__file__).parents[1]
NEWER = [f"python3.{minor}" for minor in (14, 13, 12) if minor > sys.version_info.minor]


@pytest.mark.slow
def test_the_main_job_on_a_newer_python(tmp_path):
    """Installs into an environment of its own and compares two small models. Fails where no newer Python is found."""
    working = lambda name: shutil.which(name) and subprocess.run([name, "-c", ""], capture_output=True).returncode == 0
    python = next(filter(working, NEWER))
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.egg-info"))
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", source], check=True)
    config = commands.write_config(tmp_path)
    compare = [tmp_path / "venv/bin/sparse-lm", "compare", f"--config={config}", f"--workdir={tmp_path}/compare"]
    done = subprocess.run([*compare, "--seeds=2"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compare/comparison.png").exists()
    versions = (tmp_path / "compare/sparse-seed0/config.json").read_text()
    assert '"jax": "0.12' in versions
