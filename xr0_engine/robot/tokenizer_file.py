"""Reading tokenizer.json, which a library in Rust does that panics, hangs and aborts on some files: every file is tried
in a process of its own before this one reads it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer

from xr0_engine.env import cache_dir
from xr0_engine.files import one_line, parse_json, read_bytes
from xr0_engine.robot.tokenizer_process import Panic, panics
from xr0_engine.types import CheckpointError

TOKENIZER_FILE = "tokenizer.json"

TRIED_FOLDER = "tokenizers"
"""In XR0_CACHE: an empty file for each content that was found usable, so that it is tried once on a machine."""
LIMIT_S = 20.0
"""Qwen3's takes one second."""

_usable: set[str] = set()


def read_tokenizer(path: Path) -> Tokenizer:
    """Raises CheckpointError that names the file if it is missing or none that the library can read and use."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent} holds no {path.name}: the tokenizer is missing")
    content = read_bytes(path)
    try:
        # The library takes NaN for a score and the last of two keys.
        if not isinstance(parse_json(content), Mapping):
            raise ValueError("expected an object")
        _try(path, content)
        with panics():
            return Tokenizer.from_buffer(content)
    except (ValueError, Panic) as error:
        raise CheckpointError(f"{path} is no tokenizer: {one_line(error)}") from None


def _try(path: Path, content: bytes) -> None:
    """Raises ValueError for a file that a process cannot read and use."""
    name = f"{tokenizers.__version__}-{hashlib.sha256(content).hexdigest()}"
    note = cache_dir() / TRIED_FOLDER / name
    if name in _usable or _is_there(note):
        _usable.add(name)
        return
    if fault := _fault(path):
        raise ValueError(fault)
    _usable.add(name)
    # A cache that cannot be written costs time at the next start, and nothing else.
    with contextlib.suppress(OSError, RuntimeError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.touch()


def _is_there(note: Path) -> bool:
    with contextlib.suppress(OSError, RuntimeError):
        return note.is_file()
    return False


def _fault(path: Path) -> str | None:
    # This process's own way to the package; one thread, for the memory that others would reserve.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "xr0_engine.robot.tokenizer_process", str(path.resolve())]
    try:
        run = subprocess.run(command, capture_output=True, timeout=LIMIT_S, env=environment, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return f"the library has not read and tried it within {LIMIT_S:g} s"
    if run.returncode == 0:
        fault = json.loads(run.stdout.splitlines()[-1])
        return None if fault is None else one_line(ValueError(fault))
    if run.returncode < 0:
        return f"the library ends the process that reads it, by signal {-run.returncode}"
    last = run.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"the library fails on it: {' '.join(last)}"
