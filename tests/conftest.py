"""While tests run, the shapes in signatures are enforced, and programs are compiled quickly rather than well."""

import os
import pathlib
import subprocess
import sys
import tempfile
import venv
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes nearly all the time of tests this small. Processes that tests start inherit what is set here, and
# pytest's workers the folder, so what one of them has compiled the others read.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FUSED_AS_FOR_USERS = "FUSED_AS_FOR_USERS"  # set where tests are not to be compiled in half the time
OLDER_EMITTERS = " --xla_cpu_use_fusion_emitters=false"
if FUSED_AS_FOR_USERS not in os.environ and metadata.version("jaxlib").startswith("0.10."):  # 0.12 has them no more
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").removesuffix(OLDER_EMITTERS) + OLDER_EMITTERS
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

CHECKED = ("mesh", "parameter", "registry", "routing", "experts", "models", "step", "serving", "runs", "kernels")
install_import_hook([f"sparse_lm.{name}" for name in CHECKED], "beartype.beartype")

ROOT = pathlib.Path(__file__).parents[1]
FOR_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "XLA_FLAGS": "",  # libtpu aborts at those of the CPU
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing here uses a TPU that another process could hold
}


@pytest.fixture(scope="session")
def tpu_compiler(tmp_path_factory):
    """Runs a script where libtpu is installed, in an environment of its own, and returns what it prints."""
    import jax

    from tests.commands import copy_source

    folder = tmp_path_factory.mktemp("tpu")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv/bin/python"
    packages = [copy_source(folder / "source"), f"jax=={jax.__version__}", "libtpu"]
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-compile", *packages], check=True)

    def run(script: str, *arguments: str) -> str:
        command = [python, "-c", script, *arguments]
        done = subprocess.run(command, cwd=folder, env=os.environ | FOR_TPU, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(autouse=True)
def few_programs():
    """Compiled programs are kept for the life of a process, each in mappings of its own, of which Linux allows 65,530;
    beyond them the compiler aborts. So they go when a test leaves half of that."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 32_000:
        import jax

        jax.clear_caches()


def pytest_pyfunc_call(pyfuncitem):
    """Runs a test that is marked as `bit_for_bit` in a process of its own: programs that are the same mathematics are
    the same in every bit where XLA fuses as it does for users, and not with its older emitters."""
    if FUSED_AS_FOR_USERS in os.environ or pyfuncitem.get_closest_marker("bit_for_bit") is None:
        return None
    flags = os.environ.get("XLA_FLAGS", "").removesuffix(OLDER_EMITTERS)
    environment = os.environ | {"XLA_FLAGS": flags, FUSED_AS_FOR_USERS: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", pyfuncitem.nodeid]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return True
