"""Reading the files of checkpoints and exports, telling those that git-lfs has not fetched from broken ones; writing a
file whole."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xr0_engine.types import CheckpointError

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for another."""
SETTINGS_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Where a processor that transformers 5 saves has, under `image_processor`, what 4.57 writes into SETTINGS_FILE."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises CheckpointError, naming it, for a git-lfs pointer and for what is no JSON."""
    refuse_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # A nesting too deep for the parser is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """A text file that appears whole or not at all, readable by everyone. Its folder is made. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(partial).chmod(0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def find_settings(folder: Path) -> dict[Path, Any]:
    """What a checkpoint says of its images and actions, unchecked, by the file that says it: none, one or two.

    Raises CheckpointError as read_json does.
    """
    found = {}
    plain, nested = folder / SETTINGS_FILE, folder / PROCESSOR_FILE
    if plain.is_file():
        found[plain] = read_json(plain)
    if nested.is_file():
        content = read_json(nested)
        settings = content.get("image_processor") if isinstance(content, Mapping) else None
        if isinstance(settings, Mapping):
            found[nested] = settings
    return found


def flag(values: Mapping[str, Any], name: str, default: bool) -> bool:
    """A value of a JSON object. Raises TypeError for anything but true and false."""
    value = values.get(name, default)
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r:.80}, not true or false")
    return value


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within a JSON object, empty if it is absent or null. Raises TypeError for anything else."""
    value = values.get(name) or {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {value!r:.80}, not an object")
    return value


def number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A value of a JSON object. Raises KeyError where there is neither it nor a default, TypeError for anything but a
    finite number."""
    value = values[name] if default is None else values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{name} is {value!r:.80}, not a number")
    return float(value)


def whole(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """As number, for a whole one."""
    value = number(values, name, default)
    if value != int(value):
        raise TypeError(f"{name} is {value!r}, not a whole number")
    return int(value)


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
