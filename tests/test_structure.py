"""docs/structure.md against the sources: every folder is on the map, and every place it sends a reader to is there."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from tests.test_imports import LAYERS, PACKAGE, ROOT

MAP = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
FOLDERS, _, REST = MAP.partition("## Folders")[2].partition("## Imports")
IMPORTS, _, CHANGES = REST.partition("## To change X, go to Y")
PLACE = re.compile(r"`([\w/]+\.\w+)(?:: (\w+))?`")
"""`path` or `path: Name`, the path within the package or, for tests, from the root."""


def rows() -> dict[str, str]:
    """What changes -> where to go, as the table has it."""
    lines = [line.strip("| ").split(" | ", 1) for line in CHANGES.splitlines() if line.startswith("| ")]
    return {what: places for what, places in lines[1:] if not what.startswith("-")}


def defined(path: Path) -> set[str]:
    """Top-level names of a Python file."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_the_ten_changes_are_there():
    words = (
        "embodiment",
        "layout",
        "op",
        "tactic",
        "precision",
        "variant",
        "benchmark",
        "evaluation",
        "message",
        "trigger",
    )
    assert [word for word in words if not any(re.search(rf"\b{word}\b", what) for what in rows())] == []
    assert len(rows()) == len(words)


@pytest.mark.parametrize(("what", "places"), rows().items(), ids=rows())
def test_a_reader_finds_what_the_table_names(what, places):
    found = PLACE.findall(places)
    assert found
    for name, symbol in found:
        path = ROOT / name if name.startswith("tests/") else ROOT / PACKAGE / name
        assert path.is_file(), name
        if symbol:
            assert symbol in defined(path), f"{name}: {symbol}"


def test_every_part_is_on_the_map():
    package = ROOT / PACKAGE
    folders = {path.parent.relative_to(package).as_posix() + "/" for path in package.rglob("__init__.py")} - {"./"}
    files = {path.stem for path in package.glob("*.py*") if path.suffix in (".py", ".pyi")} - {"__init__", "__main__"}
    assert {name for name in folders | files if f"`{name}`" not in FOLDERS} == set()
    named = set(re.findall(r"`([\w/]+)`", FOLDERS.partition("|---|---|")[2]))
    assert {name for name in named if name.endswith("/")} - folders - {"csrc/"} == set()


def test_the_import_table_is_the_one_that_is_checked():
    drawn = IMPORTS.split("```")[1].strip().splitlines()
    assert [set(line.split()) for line in drawn] == [set(row) for row in LAYERS]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/*.md", "xr0_engine/*/results/*.md"])
def test_pages_lead_to_files_and_through_no_link(page):
    """A page on the web follows no symbolic link."""
    for path in ROOT.glob(page):
        for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text(encoding="utf-8")):
            found = path.parent / target
            assert found.exists(), f"{path.name}: {target}"
            normal = Path(os.path.normpath(found))
            assert normal.resolve() == ROOT.resolve() / normal.relative_to(ROOT), f"{path.name}: {target}"
