"""Imports go one way: down the list of packages in docs/architecture.md, never up."""

import ast
import pathlib
import subprocess
import sys

import sparse_lm

ROOT = pathlib.Path(sparse_lm.__file__).parent
ORDER = (
    "errors paths ranges stored_config config registry layouts command_line stack host_memory mesh parameter data "
    "kernels routing experts models step cost serving runs scaling profile cli __main__"
).split()


def room(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("sparse_lm.")}


def test_no_import_points_back():
    backward = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.rglob("*.py")
        if path.parent != ROOT or path.name != "__init__.py"
        for name in imported(path)
        if name in ORDER and ORDER.index(name) > ORDER.index(room(path))
    ]
    assert not backward


def test_every_room_is_in_the_list():
    rooms = {room(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(ORDER)


def test_config_and_stack_need_no_jax():
    code = "import sys, sparse_lm.stack, sparse_lm.command_line; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_nothing_imports_tensorflow_or_torch():
    modules = "sparse_lm.runs.train, sparse_lm.runs.replay"
    code = f"import sys, {modules}; sys.exit(bool({{'tensorflow', 'torch'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
