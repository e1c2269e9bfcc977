"""Imports point downward only: the sources are parsed and held against the table below (docs/structure.md draws it)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "xr0_engine"

# A part is a file or folder of the package. It may import itself and the parts of lower rows, never its own row.
LAYERS = (
    ("__main__",),
    ("__init__", "cli"),
    ("verify", "drive"),
    ("bench",),
    ("export", "training", "serve", "plot"),
    ("engine", "checkpoint", "sim"),
    ("model", "exported", "executor"),
    ("preprocess", "flow", "decode", "graph", "tactics"),
    ("normalize", "prompt", "embodiment", "ops"),
    ("fused_ops",),
    ("kernels", "_C"),
    ("config", "comparison"),
    ("types", "env"),
)

# Parts that see less of the package than the rows below theirs.
SEES_ONLY = {"executor": {"types", "decode"}, "kernels": set[str]()}

# Parts that few others may import.
SEEN_ONLY_BY = {"kernels": {"ops", "fused_ops"}, "_C": {"ops"}}

# Parts that must do with few packages besides the standard library.
THIRD_PARTY = {"executor": {"numpy"}, "kernels": {"torch", "triton"}, "types": {"numpy"}, "env": set[str]()}

# Names of the package itself that its modules may import from it.
SHARED_NAMES = {"__version__"}

# Folders at the root that are parts of the package: under their own names they would be imported twice.
LINKED = ("kernels", "export", "training", "bench")

LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}


def part_of(module: str) -> str:
    """xr0_engine.model.dit -> model."""
    return [*module.split("."), "__init__"][1]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, imported module, whether at run time) of every import; xr0_engine.a for `from xr0_engine import a`.

    A relative import comes with its dots.
    """
    typing_only = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and ast.unparse(guard.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in guard.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == PACKAGE else [base]
        for name in names:
            yield node.lineno, name, id(node) not in typing_only


def violations(module: str, source: str) -> list[str]:
    """What the imports of a module (dotted name) break."""
    found = []
    part = part_of(module)
    if module.split(".")[0] == PACKAGE and part not in LEVEL:
        return [f"{module}: no place in LAYERS of tests/test_imports.py; give {part!r} one"]
    for line, name, at_run_time in imports(ast.parse(source)):
        reason = None
        root = name.split(".")[0]
        if not root:
            reason = "is relative: write the module's full name"
        elif root in LINKED:
            reason = f"is to be imported as {PACKAGE}.{name}"
        elif module.split(".")[0] != PACKAGE:
            continue
        elif root == PACKAGE:
            reason = misplaced(part, part_of(name))
        elif at_run_time and part in THIRD_PARTY and root not in {*THIRD_PARTY[part], *sys.stdlib_module_names}:
            reason = f"is not among the packages that {part} may use: {sorted(THIRD_PARTY[part])}"
        if reason:
            found.append(f"{module}:{line}: {name} {reason}")
    return found


def misplaced(part: str, imported: str) -> str | None:
    """Why `part` may not import the part `imported`, or None."""
    if imported == part or imported in SHARED_NAMES:
        return None
    if imported not in LEVEL:
        return "has no place in LAYERS"
    if part in SEES_ONLY and imported not in SEES_ONLY[part]:
        return f"is hidden from {part}, which sees {sorted(SEES_ONLY[part])} of the package"
    if part not in SEEN_ONLY_BY.get(imported, {part}):
        return f"is for {' and '.join(sorted(SEEN_ONLY_BY[imported]))} alone"
    if LEVEL[imported] <= LEVEL[part]:
        return f"is not below {part}"
    return None


def sources() -> dict[str, Path]:
    """Dotted name -> file, for the package (the linked folders through their links), the tests and setup.py."""
    package = [path for top in (ROOT / PACKAGE).iterdir() for path in ([top] if top.is_file() else top.rglob("*"))]
    paths = [path for path in package if path.suffix in (".py", ".pyi")]
    paths += [*(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


SOURCES = sources()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_downward(module):
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_linked_folders_are_among_the_sources():
    assert [name for name in LINKED if not (ROOT / PACKAGE / name).is_symlink()] == []
    assert f"{PACKAGE}.kernels.reference" in SOURCES


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        pytest.param("model.dit", "from xr0_engine.engine import Engine", "not below model", id="upward"),
        pytest.param("decode", "from xr0_engine import flow", "not below decode", id="same row"),
        pytest.param("model.dit", "from . import layers", "relative", id="relative"),
        pytest.param("model.dit", "def f():\n    import xr0_engine.training", "not below model", id="in a function"),
        pytest.param("serve.server", "from xr0_engine.training import losses", "not below serve", id="serve, training"),
        pytest.param(
            "model.vlm", "from xr0_engine.kernels import reference", "for fused_ops and ops alone", id="kernels"
        ),
        pytest.param("preprocess", "from xr0_engine import _C", "for ops alone", id="native"),
        pytest.param("executor.loop", "from xr0_engine.config import XR0Config", "hidden from executor", id="executor"),
        pytest.param("executor.loop", "import torch", "not among the packages", id="executor, torch"),
        pytest.param("kernels.norm", "from xr0_engine import env", "hidden from kernels", id="kernels, env"),
        pytest.param("kernels.norm", "import numpy as np", "not among the packages", id="kernels, numpy"),
        pytest.param("types", "import torch", "not among the packages", id="types, torch"),
        pytest.param("engine", "from xr0_engine import Engine", "no place in LAYERS", id="lazy name"),
        pytest.param("engine", "import xr0_engine.gadgets", "no place in LAYERS", id="unknown import"),
        pytest.param("gadgets", "import math", "no place in LAYERS", id="unknown module"),
        pytest.param("ops", "from kernels import reference", "imported as xr0_engine.kernels", id="root folder"),
    ],
)
def test_checker_catches(module, source, complaint):
    assert [message for message in violations(f"{PACKAGE}.{module}", source) if complaint in message]


def test_checker_catches_root_folders_in_tests():
    assert violations("tests.test_x", "import bench.timing") != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        pytest.param("types", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", id="types only"),
        pytest.param("ops", "from xr0_engine.kernels import reference", id="ops, kernels"),
        pytest.param("kernels.a", "import math, torch, triton.language\nimport xr0_engine.kernels.b", id="kernels"),
        pytest.param("training.trainer", "from xr0_engine.model.dit import ActionHead", id="downward"),
        pytest.param("engine", "from xr0_engine import __version__, ops", id="version"),
        pytest.param("executor.frame", "from xr0_engine.decode import anchor", id="executor, decode"),
    ],
)
def test_checker_accepts(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []
