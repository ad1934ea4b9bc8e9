"""The main job runs on a newer Python with a newer jax."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests import commands

MINORS = [minor for minor in (14, 13, 12) if minor > sys.version_info.minor]


def newer_pythons() -> list[str]:
    """Interpreters newer than this one: on the path, and those of pyenv, which are not on it."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [shutil.which(f"python3.{m}") for m in MINORS]
    found += [str(path) for m in MINORS for path in sorted(pyenv.glob(f"3.{m}.*/bin/python"))]
    return [p for p in found if p and subprocess.run([p, "-c", ""], capture_output=True).returncode == 0]


@pytest.mark.slow
def test_the_main_job_on_a_newer_python(tmp_path):
    """Installs into an environment of its own and compares two small models. Fails where no newer Python is found."""
    python, *_ = newer_pythons()
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    source = commands.copy_source(tmp_path / "source")
    subprocess.run([tmp_path / "venv/bin/pip", "install", "-q", source], check=True)
    config = commands.write_config(tmp_path)
    compare = [tmp_path / "venv/bin/sparse-lm", "compare", f"--config={config}", f"--workdir={tmp_path}/compare"]
    environment = os.environ | {"XLA_FLAGS": ""}  # a newer XLA aborts at flags that it has not
    done = subprocess.run([*compare, "--seeds=2"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "compare/comparison.png").exists()
    versions = (tmp_path / "compare/sparse-seed0/config.json").read_text()
    assert '"jax": "0.12' in versions
