"""docs/one_tokens_way.md is true: each function is in its file and calls what the page says that it calls."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = ROOT / "docs/one_tokens_way.md"
HOPS = re.findall(r"^\| (\d+) \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", PAGE.read_text(), re.M)


def function(tree: ast.AST, name: str) -> ast.AST | None:
    for part in name.split("."):
        tree = next((node for node in tree.body if getattr(node, "name", None) == part), None)
        if tree is None:
            return None
    return tree


@pytest.mark.parametrize("hop, file, name, called", HOPS)
def test_each_hop_is_there(hop, file, name, called):
    node = function(ast.parse((ROOT / file).read_text()), name)
    assert node is not None, f"{file} has no {name}"
    calls = {ast.unparse(call.func) for call in ast.walk(node) if isinstance(call, ast.Call)}
    assert called in calls, f"{name} of {file} calls {', '.join(sorted(calls))}"


def test_every_hop_of_the_page_was_read():
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == len(HOPS) > 10
