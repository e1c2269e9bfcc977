"""A run as a file: one JSON object a line, written while it happens, so that a crash leaves all but its end.

Every line has a `kind`: `session` (the first line: settings), `inference` (a request), `chunk` (an accepted one, with
its rows), `lost` (a request that gave none, and why), `step` (what the robot was told), `missed` (steps that passed),
`clock` (it went backwards), `report` (the end). Times are seconds on the executor's clock.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

VERSION = 1
FIELDS = {
    "session": {"version", "title", "settings", "layout", "width"},
    "inference": {"number", "time_s", "observed_s", "first_step", "prefix_length"},
    "chunk": {"number", "time_s", "finished_s", "first_step", "takeover", "prefix_length", "late", "rows"},
    "lost": {"number", "time_s", "reason", "detail"},
    "step": {"step", "time_s", "source", "chunk", "index", "row", "clipped"},
    "missed": {"first", "count"},
    "clock": {"time_s"},
    "report": {"counts", "jitter", "delay", "seams", "inner", "last_error", "ended"},
}
"""Kind of line -> what it holds."""


class Recorder:
    """Writes a recording. Use it as a context manager; the control loop only hands over, a thread formats and writes.

    title: what is executed, for people. Raises FileExistsError if there is such a file, OSError if it cannot be made. A
    disk that fails later ends the recording, not the robot's motion: closing then raises the OSError.
    """

    def __init__(self, path: Path, title: str) -> None:
        self.title = title
        file = path.open("x", encoding="utf-8")
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._work, args=(file,), name="xr0-recorder", daemon=True)
        self._thread.start()

    def write(self, kind: str, **fields: Any) -> None:
        """Add a line; see FIELDS. They hold what JSON can, and are not changed afterwards. Returns at once."""
        if self._failure is None:
            self._lines.put({"kind": kind, **fields})

    def close(self) -> None:
        """Write what is left."""
        self._lines.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _work(self, file: TextIO) -> None:
        try:
            with file:
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line) + "\n")
                    if self._lines.empty():
                        file.flush()
        except OSError as error:
            self._failure = error


@dataclass(frozen=True)
class Recording:
    """A run read back. header: the first line; lines: kind -> its lines, in order, with the fields of FIELDS."""

    header: Mapping[str, Any]
    lines: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_recording(path: Path) -> Recording:
    """Read what Recorder wrote; a last line that was cut off is left out.

    Raises ValueError that names the file and the line at fault, OSError if it cannot be read.
    """
    header: dict[str, Any] | None = None
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FIELDS}
    with path.open(encoding="utf-8", errors="strict") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                break
            line = _parse(path, number, text)
            if header is None:
                if line.get("kind") != "session" or line.get("version") != VERSION:
                    raise ValueError(f"{path}: expected a session of version {VERSION}, got {text[:80].strip()!r}")
                header = line
            kind = line.get("kind")
            if kind not in FIELDS:
                raise ValueError(f"{path}, line {number}: expected one of {', '.join(FIELDS)}, got {kind!r}")
            if missing := FIELDS[kind] - line.keys():
                raise ValueError(f"{path}, line {number}: {kind} lacks {', '.join(sorted(missing))}")
            lines[kind].append(line)
    if header is None:
        raise ValueError(f"{path}: expected a session, got an empty file")
    return Recording(header, lines)


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"{path}, line {number}: expected an object, got {text[:80].strip()!r}")
    return line
