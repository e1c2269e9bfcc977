"""requirements.lock, of `make lock`: the versions of constraints.txt, with sums of their files, on every Python."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Its wheels for CPUs are of PyTorch's own index, and on PyPI it has a Triton of its own.
NOT_LOCKED = {"torch"}


def requirements(text: str) -> Iterator[Requirement]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield Requirement(line.split("--hash")[0])


def versions(text: str, python: str) -> dict[str, str]:
    """Name -> version, on Linux."""
    on = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux"}
    found: dict[str, str] = {}
    for each in requirements(text):
        if each.marker is None or each.marker.evaluate(on):
            assert each.name not in found, f"{each.name} twice on Python {python}"
            found[each.name] = str(each.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_versions_are_those_of_the_constraints(python):
    locked, constrained = versions(LOCK, python), versions(CONSTRAINTS, python)
    found = {name: locked.get(name) for name in constrained if name not in NOT_LOCKED}
    # What has no wheels from 3.13 on is not asked for there.
    if python == "3.13":
        for name in ("dm-control", "gym-aloha"):
            assert found.pop(name) is None
    assert found == {name: version for name, version in constrained.items() if name in found}
    assert NOT_LOCKED & locked.keys() == set()


def test_every_version_has_sums_and_nothing_else_is_said():
    entries = re.split(r"\n(?=\S)", LOCK.strip())
    assert len(entries) == len(list(requirements(LOCK))) > 150
    for entry in entries:
        name, *sums = entry.split(" \\\n    ")
        assert re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; .+)?", name)
        assert sums, name
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", each) for each in sums), name
    assert "://" not in LOCK


def test_what_the_project_asks_for_is_locked():
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11 and later")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = {Requirement(each) for extra, those in extras.items() if extra != "libero" for each in those}
    asked |= {Requirement(each) for each in project["dependencies"]}
    locked = versions(LOCK, "3.12")
    for each in asked:
        name = each.name.lower().replace("_", "-")
        if name not in {"xr0-engine", *NOT_LOCKED}:
            assert locked[name] in each.specifier, name
