"""Simulators that users install: what is missing is named, and what is there is told by version and commit."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xr0_engine.evaluation.installed import check_suites, required, version_of

REMEDY = "Clone it."


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    answer = subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return answer.stdout.strip()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "xr0_test_simulator"
    folder.mkdir()
    (folder / "__init__.py").write_text("", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    # What a test before has imported under this name.
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder


def test_names_what_is_missing_and_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"xr0_no_such cannot be imported \(No module named 'xr0_no_such'\). Clone"):
        required("xr0_no_such", REMEDY)
    with pytest.raises(RuntimeError, match="Clone it"):
        version_of("xr0_no_such", "xr0-no-such", REMEDY)


def test_names_the_dependency_that_a_package_lacks(package: Path) -> None:
    (package / "environment.py").write_text("import xr0_no_such_renderer\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="No module named 'xr0_no_such_renderer'"):
        required("xr0_test_simulator.environment", REMEDY)


def test_version_of_what_pip_installed() -> None:
    assert version_of("rich", "rich", REMEDY)[0].isdigit()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_of_a_clone(package: Path) -> None:
    clone = package.parent
    git(clone, "init", "-q")
    # In a clone, but none of its files.
    assert version_of("xr0_test_simulator", "xr0-test-simulator", REMEDY) == "unknown"
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "all")
    commit = git(clone, "rev-parse", "HEAD")
    assert version_of("xr0_test_simulator", "xr0-test-simulator", REMEDY) == f"unknown at {commit}"


def test_lists_suites() -> None:
    check_suites(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="suite: expected one of a, b, got c, d"):
        check_suites(["c", "a", "d"], ["a", "b"])
