"""Reading the files of checkpoints and exports, and telling those that git-lfs has not fetched from broken ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xr0_engine.types import CheckpointError

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError, naming it, for a git-lfs pointer and for what is no JSON."""
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # A nesting too deep for the parser is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def refuse_pointer(path: Path) -> None:
    """Raises CheckpointError if the file is what pointer_fault tells of."""
    fault = pointer_fault(path)
    if fault:
        raise CheckpointError(fault)


def pointer_fault(path: Path) -> str | None:
    """What is wrong with a file that git-lfs has not fetched, and the remedy; None for any other."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) != LFS_POINTER:
            return None
    return f"{path} is a git-lfs pointer, not the file: run `git lfs install` and `git lfs pull` in {path.parent}"
