"""A session as a file: one JSON object a line, written while it happens, so that a crash leaves all but its end.

The first line is the header. The others have a `kind`: `inference` (a request), `chunk` (an accepted one, with its
rows), `lost` (a request that gave none, and why), `step` (what the robot was told), `missed` (steps that passed),
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
KINDS = ("inference", "chunk", "lost", "step", "missed", "clock", "report")


class Recorder:
    """Writes a session. Use it as a context manager; the control loop only hands over, a thread formats and writes.

    Raises FileExistsError if there is such a file, OSError if it cannot be made. A disk that fails later ends the
    recording, not the robot's motion: closing then raises the OSError.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        first_line = json.dumps({"kind": "session", "version": VERSION, **header})
        file = path.open("x", encoding="utf-8")
        self._lines: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._work, args=(file, first_line), name="xr0-recorder", daemon=True)
        self._thread.start()

    def write(self, kind: str, **fields: Any) -> None:
        """Add one line of one of KINDS; fields hold what JSON can, not changed afterwards. Returns at once."""
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

    def _work(self, file: TextIO, first_line: str) -> None:
        try:
            with file:
                file.write(first_line + "\n")
                while (line := self._lines.get()) is not None:
                    file.write(json.dumps(line) + "\n")
                    if self._lines.empty():
                        file.flush()
        except OSError as error:
            self._failure = error


@dataclass(frozen=True)
class Session:
    """A session read back. header: the first line; lines: kind -> its lines, in order."""

    header: Mapping[str, Any]
    lines: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_session(path: Path) -> Session:
    """Read what Recorder wrote; a last line that was cut off is left out.

    Raises ValueError that names the file and the line at fault, OSError if it cannot be read.
    """
    header: dict[str, Any] | None = None
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with path.open(encoding="utf-8", errors="strict") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith("\n"):
                break
            line = _parse(path, number, text)
            if header is None:
                if line.get("kind") != "session" or line.get("version") != VERSION:
                    raise ValueError(f"{path}: expected a session of version {VERSION}, got {text[:80].strip()!r}")
                header = line
            elif line.get("kind") not in KINDS:
                raise ValueError(f"{path}, line {number}: expected one of {', '.join(KINDS)}, got {line.get('kind')!r}")
            else:
                lines[line["kind"]].append(line)
    if header is None:
        raise ValueError(f"{path}: expected a session, got an empty file")
    return Session(header, lines)


def _parse(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: not valid JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"{path}, line {number}: expected an object, got {text[:80].strip()!r}")
    return line
