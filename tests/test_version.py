"""The version moves with the changelog, and runs of every released version are kept."""

import pathlib
import re

import sparse_lm

ROOT = pathlib.Path(__file__).parents[1]
RELEASES = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)  # newest first


def number(version):
    return [int(part) for part in version.split(".")]


def written(file, pattern):
    (found,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
    return found


def test_the_version_is_the_newest_of_the_changelog():
    assert written("setup.py", r'^ *version="(.*)",$') == RELEASES[0]
    assert written("CITATION.cff", r"^version: (.*)$") == RELEASES[0]
    assert sparse_lm.__version__ == RELEASES[0]


def test_the_changelog_lists_releases_newest_first():
    assert RELEASES == sorted(set(RELEASES), key=number, reverse=True)


def test_runs_of_every_released_version_are_kept():
    kept = {path.name for path in (ROOT / "tests/fixtures/runs").glob("*.tar.xz")}
    assert {f"{version}.tar.xz" for version in RELEASES[1:]} <= kept
