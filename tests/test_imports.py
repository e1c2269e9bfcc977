"""Imports point downward only: the sources are parsed and held against the table below (docs/structure.md draws it)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "xr0_engine"

# A part is a file or folder of the package. It may import itself and the parts of lower rows, never its own row.
LAYERS = (
    ("__main__",),
    ("__init__", "cli"),
    ("lab", "publish", "quantize"),
    ("evaluation",),
    ("golden", "drive", "viz"),
    ("bench",),
    ("export", "training", "exchange", "serve", "plot"),
    ("engine", "checkpoint", "embodiment", "sim"),
    ("fused", "exported", "guard"),
    ("model", "executor"),
    ("robot", "sizes"),
    ("kernels", "_C"),
    ("backend", "comparison", "config"),
    ("family", "hub", "part_configs", "whole"),
    ("files",),
    ("yaml_loader",),
    ("types", "env"),
)

# Parts that see less of the package than the rows below theirs: these modules and what is inside them.
SEES_ONLY = {
    "executor": {"files", "types", "robot.decode", "robot.layouts", "robot.history"},
    "guard": {"files", "types", "whole", "robot.history"},
    "kernels": set[str](),
}

# Modules that few parts may import. The oracles in kernels.reference are the reference backend: everyone's.
SEEN_ONLY_BY = {"kernels": {"fused"}, "kernels.reference": {"model", "fused", "bench"}, "_C": {"robot"}}

# Parts that must do with few packages besides the standard library.
THIRD_PARTY = {
    "executor": {"numpy"},
    "guard": {"numpy"},
    "kernels": {"torch", "triton"},
    "types": {"numpy"},
    "env": set[str](),
}

# Names of the package itself that its modules may import from it.
SHARED_NAMES = {"__version__"}

# Links at the root to parts of the package: under their own names they would be imported twice.
LINKED = ("kernels", "export", "training", "bench")

LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}


def inside(module: str) -> str:
    """xr0_engine.model.dit -> model.dit; xr0_engine -> __init__."""
    return module.partition(".")[2] or "__init__"


def part_of(module: str) -> str:
    """xr0_engine.model.dit -> model."""
    return inside(module).split(".")[0]


def imports(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """(line, imported module, whether at run time) of every import; p.a for `from p import a`, p within the package.

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
            ours = base.split(".")[0] == PACKAGE
            names = [f"{base}.{alias.name}" for alias in node.names] if ours else [base]
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
            reason = misplaced(part, inside(name))
        elif at_run_time and part in THIRD_PARTY and root not in {*THIRD_PARTY[part], *sys.stdlib_module_names}:
            reason = f"is not among the packages that {part} may use: {sorted(THIRD_PARTY[part])}"
        if reason:
            found.append(f"{module}:{line}: {name} {reason}")
    return found


def misplaced(part: str, name: str) -> str | None:
    """Why `part` may not import `name`, a module within the package or a name in one; None if it may."""
    imported = name.split(".")[0]
    if imported == part or imported in SHARED_NAMES:
        return None
    if imported not in LEVEL:
        return "has no place in LAYERS"
    if part in SEES_ONLY and not lies_in(name, SEES_ONLY[part]):
        return f"is hidden from {part}, which sees {sorted(SEES_ONLY[part])} of the package"
    guards = [guarded for guarded in SEEN_ONLY_BY if lies_in(name, {guarded})]
    if guards and part not in SEEN_ONLY_BY[max(guards, key=len)]:
        return f"is for {' and '.join(sorted(SEEN_ONLY_BY[max(guards, key=len)]))} alone"
    if LEVEL[imported] <= LEVEL[part]:
        return f"is not below {part}"
    return None


def lies_in(name: str, modules: Set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def sources() -> dict[str, Path]:
    """Dotted name -> file, for the package, the tests and setup.py."""
    paths = [path for path in (ROOT / PACKAGE).rglob("*") if path.suffix in (".py", ".pyi")]
    paths += [*(ROOT / "tests").rglob("*.py"), ROOT / "setup.py"]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


SOURCES = sources()


def arrows(texts: Mapping[str, str]) -> dict[str, set[str]]:
    """Module of the package -> those that it imports anywhere in its text, TYPE_CHECKING included."""
    ours = [module for module in texts if module.split(".")[0] == PACKAGE and module != PACKAGE]

    def owner(name: str) -> str:
        return name if name in texts else name.rpartition(".")[0]

    return {
        module: {owner(name) for _, name, _ in imports(ast.parse(texts[module]))} & set(ours) - {module}
        for module in ours
    }


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_downward(module):
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_no_circle_of_modules():
    """__init__ of the package itself aside, whose lazy names lead everywhere."""
    found = arrows({module: path.read_text(encoding="utf-8") for module, path in SOURCES.items()})
    assert sum(map(len, found.values())) > 300
    TopologicalSorter(found).prepare()


def test_circle_is_caught():
    later = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from xr0_engine.serve.a import A"
    texts = {f"{PACKAGE}.serve.a": "from xr0_engine.serve import b", f"{PACKAGE}.serve.b": later}
    with pytest.raises(CycleError):
        TopologicalSorter(arrows(texts)).prepare()


@pytest.mark.parametrize("module", sorted(name for name in SOURCES if name.split(".")[0] == PACKAGE))
def test_every_file_says_what_it_does(module):
    assert ast.get_docstring(ast.parse(SOURCES[module].read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        pytest.param("model.dit", "from xr0_engine.engine import Engine", "not below model", id="upward"),
        pytest.param("fused.model", "from xr0_engine import exported", "not below fused", id="same row"),
        pytest.param("model.dit", "from . import layers", "relative", id="relative"),
        pytest.param("model.dit", "def f():\n    import xr0_engine.training", "not below model", id="in a function"),
        pytest.param("serve.server", "from xr0_engine.training import losses", "not below serve", id="serve, training"),
        pytest.param("model.vlm", "from xr0_engine.kernels import linear", "for fused alone", id="kernels"),
        pytest.param("engine", "from xr0_engine.kernels import reference", "for bench and fused and", id="oracles"),
        pytest.param("exported.model", "from xr0_engine import _C", "for robot alone", id="native"),
        pytest.param("executor.loop", "from xr0_engine import config", "hidden from executor", id="executor"),
        pytest.param("executor.loop", "from xr0_engine.robot import patches", "hidden from", id="executor, robot"),
        pytest.param("executor.loop", "import torch", "not among the packages", id="executor, torch"),
        pytest.param("guard.watch", "import torch", "not among the packages", id="guard, torch"),
        pytest.param("guard.watch", "from xr0_engine.robot import views", "hidden from guard", id="guard, robot"),
        pytest.param("kernels.norm", "from xr0_engine import env", "hidden from kernels", id="kernels, env"),
        pytest.param("kernels.norm", "import numpy as np", "not among the packages", id="kernels, numpy"),
        pytest.param("types", "import torch", "not among the packages", id="types, torch"),
        pytest.param("engine", "from xr0_engine import Engine", "no place in LAYERS", id="lazy name"),
        pytest.param("engine", "import xr0_engine.gadgets", "no place in LAYERS", id="unknown import"),
        pytest.param("gadgets", "import math", "no place in LAYERS", id="unknown module"),
        pytest.param("model.dit", "from kernels import reference", "imported as xr0_engine.kernels", id="root folder"),
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
        pytest.param("model.dit", "from xr0_engine.kernels import reference", id="model, oracles"),
        pytest.param("model.dit", "from xr0_engine.kernels.reference import rotate", id="model, one oracle"),
        pytest.param("kernels.a", "import math, torch, triton.language\nimport xr0_engine.kernels.b", id="kernels"),
        pytest.param("training.trainer", "from xr0_engine.model.dit import ActionHead", id="downward"),
        pytest.param("engine", "from xr0_engine import __version__, backend", id="version"),
        pytest.param("executor.frame", "from xr0_engine.robot.decode import anchor", id="executor, decode"),
    ],
)
def test_checker_accepts(module, source):
    assert violations(f"{PACKAGE}.{module}", source) == []
