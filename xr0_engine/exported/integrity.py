"""Whether an export's files are those that were written: SHA-256 sums, computed once per version of a file.

A sum that was computed is remembered in the cache folder (env.py: cache_dir) under the file's path, with what changes
when the file does: size, times of change, inode. Without a cache folder every start computes them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from xr0_engine.env import cache_dir
from xr0_engine.exported.manifest import READ_BYTES, FileRecord, check_sizes
from xr0_engine.files import read_json
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

FOLDER = "checked"
SUM = "sha256"


def check_files(files: Mapping[Path, FileRecord]) -> None:
    """Raises ValueError that names every file that is missing, of another size, or of another SHA-256 sum."""
    check_sizes(files)
    known = {path: _recall(path) for path in files}
    missing = [path for path, known_sum in known.items() if known_sum is None]
    sums = {path: known_sum for path, known_sum in known.items() if known_sum is not None} | _compute(missing)
    changed = [str(path) for path, record in files.items() if sums[path] != record.sha256]
    if changed:
        raise ValueError(
            f"the export is not as it was written: {', '.join(changed)}: another content than the SHA-256 sum in its "
            "manifest. Copy the right file there, or make the export again (xr0 export)"
        )


def remember(files: Mapping[Path, FileRecord]) -> None:
    """Take the sums of files that were just written for computed."""
    for path, record in files.items():
        _store(path, _version(path), record.sha256)


def _compute(paths: Iterable[Path]) -> dict[Path, str]:
    """The sums of files, which are remembered. A bar tells how far it is."""
    paths = list(paths)
    console = Console(stderr=True)
    columns = (TextColumn("checking the export"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    sums = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("sums", total=sum(path.stat().st_size for path in paths))
        for path in paths:
            # Before it is read: a change while it is read makes another version.
            version = _version(path)
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
                    progress.advance(task, len(chunk))
            sums[path] = digest.hexdigest()
            _store(path, version, sums[path])
    return sums


def _version(path: Path) -> dict[str, object]:
    """What tells one version of a file from another."""
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _note(path: Path) -> Path:
    """Where a file's sum is remembered: one note for each file, so that processes do not get in each other's way."""
    name = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()
    return cache_dir() / FOLDER / f"{name}.json"


def _recall(path: Path) -> str | None:
    """The remembered sum of this version of the file, None if there is none."""
    # No note, a broken one, no home folder: the sum is computed.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        content = read_json(_note(path), FileError)
        if (
            isinstance(content, dict)
            and content.items() >= _version(path).items()
            and isinstance(content.get(SUM), str)
        ):
            return str(content[SUM])
    return None


def _store(path: Path, version: Mapping[str, object], sum_: str) -> None:
    # A cache that cannot be written costs time at the next start, and nothing else.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        write_whole(_note(path), json.dumps({**version, SUM: sum_}))
