"""Simulators that users install themselves: imported when they are needed, and what they are."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

GIT_S = 10.0


def required(module: str, remedy: str) -> Any:
    """The module of that name. Raises RuntimeError with the reason and the remedy where it cannot be imported."""
    try:
        return import_module(module)
    except ImportError as reason:
        raise RuntimeError(f"{module} cannot be imported ({reason}). {remedy}") from reason


def check_suites(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError that lists the suites, for names that are none."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"suite: expected one of {', '.join(known)}, got {', '.join(unknown)}")


def version_of(module: str, distribution: str, remedy: str) -> str:
    """The distribution's version, and the commit where it is a clone. Raises RuntimeError if it is not installed."""
    found = required(module, remedy)
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        version = "unknown"
    commit = _commit(Path(next(iter(found.__path__))))
    return f"{version} at {commit}" if commit else version


def _commit(folder: Path) -> str | None:
    """Of the clone that a package's folder is part of; None outside of one, or without git."""
    # A virtual environment in somebody's clone is not of that clone.
    return _git(folder, "rev-parse", "HEAD") if _git(folder, "ls-files", ".") else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=GIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
