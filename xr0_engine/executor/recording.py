"""A run as a file: one JSON object a line, written while it happens, so that a crash leaves all but its end.

Every line has a `kind`: `session` (the first line: settings), `inference` (a request), `chunk` (an accepted one, with
its rows), `lost` (a request that gave none, and why), `step` (what the robot was told), `missed` (steps that passed),
`clock` (it went backwards), `warning` (of a guard), `report` (the end). Times are seconds on the executor's clock.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO, get_args

from xr0_engine.executor.settings import MAX_LOOP_HZ, Mode
from xr0_engine.files import is_number, json_lines
from xr0_engine.types import FileError, Observation

VERSION = 1
WIDEST = 1024
"""Columns of an action; released policies have 32."""
LARGEST = 1e12
"""Of steps, numbers and seconds: 30,000 years."""
OR_NULL = " or null"
FIELDS: dict[str, dict[str, str]] = {
    "session": {
        "version": "whole",
        "title": "text",
        "settings": "settings",
        "layout": "text",
        "width": "width",
    },
    "inference": {
        "number": "whole",
        "time_s": "number",
        "observed_s": "number",
        "first_step": "whole",
        "prefix_length": "whole",
    },
    "chunk": {
        "number": "whole",
        "time_s": "number",
        "finished_s": "number",
        "first_step": "whole",
        "takeover": "whole or null",
        "prefix_length": "whole",
        "late": "whole",
        "rows": "rows",
    },
    "lost": {"number": "whole", "time_s": "number", "reason": "text", "detail": "text or null"},
    "step": {
        "step": "whole",
        "time_s": "number",
        "source": "text",
        "chunk": "whole or null",
        "index": "whole or null",
        "row": "row",
        "clipped": "any",
    },
    "missed": {"first": "whole", "count": "whole"},
    "clock": {"time_s": "number"},
    "warning": {
        "name": "text",
        "value": "number",
        "threshold": "number",
        "detail": "text",
        "time_s": "number",
    },
    "report": {
        "counts": "counts",
        "jitter": "any",
        "delay": "any",
        "seams": "any",
        "inner": "any",
        "last_error": "any",
        "ended": "any",
    },
}
"""Kind of line -> what it holds -> of which kind: see _is_right."""


class Notes(Protocol):
    """Who is told what a run does, from the control loop: each method has to return at once. title: of what is
    executed, for people."""

    title: str

    def write(self, kind: str, **fields: Any) -> None:
        """A line of a recording: see FIELDS."""

    def saw(self, number: int, observation: Observation) -> None:
        """What inference `number` starts from, right after its line."""


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

    def saw(self, number: int, observation: Observation) -> None:
        """Lines hold no pictures."""

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


class Several:
    """Tells several what it is told. notes: at least one, of which the first gives the title."""

    def __init__(self, notes: Sequence[Notes]) -> None:
        self.title, self._notes = notes[0].title, notes

    def write(self, kind: str, **fields: Any) -> None:
        for each in self._notes:
            each.write(kind, **fields)

    def saw(self, number: int, observation: Observation) -> None:
        for each in self._notes:
            each.saw(number, observation)


@dataclass(frozen=True)
class Recording:
    """A run read back. header: the first line; lines: kind -> its lines, in order, with the fields of FIELDS."""

    header: Mapping[str, Any]
    lines: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_recording(path: Path) -> Recording:
    """Read what Recorder wrote; a last line that was cut off is left out.

    Raises FileError, a ValueError, that names the file and the line at fault, OSError if it cannot be read.
    """
    header: dict[str, Any] | None = None
    lines: dict[str, list[dict[str, Any]]] = {kind: [] for kind in FIELDS}
    for number, line in json_lines(path, FileError):
        kind = line.get("kind")
        if header is None:
            if kind != "session" or line.get("version") != VERSION:
                raise FileError(f"{path}: expected a session of version {VERSION}, got {line!r:.80}")
            header = line
        if not isinstance(kind, str) or kind not in FIELDS:
            raise FileError(f"{path}, line {number}: expected one of {', '.join(FIELDS)}, got {kind!r:.80}")
        if missing := FIELDS[kind].keys() - line.keys():
            raise FileError(f"{path}, line {number}: {kind} lacks {', '.join(sorted(missing))}")
        for name, expected in FIELDS[kind].items():
            if not _is_right(expected, line[name], header["width"]):
                raise FileError(f"{path}, line {number}: {kind}: {name}: expected {expected}, got {line[name]!r:.80}")
        lines[kind].append(line)
    if header is None:
        raise FileError(f"{path}: expected a session, got an empty file")
    return Recording(header, lines)


def _is_right(expected: str, value: Any, width: Any) -> bool:
    """Whether a value is what FIELDS says. width: the session's."""
    if expected.endswith(OR_NULL):
        return value is None or _is_right(expected.removesuffix(OR_NULL), value, width)
    if expected == "text":
        return isinstance(value, str)
    if expected == "width":
        return type(value) is int and 1 <= value <= WIDEST
    if expected == "whole":
        return type(value) is int and -LARGEST <= value <= LARGEST
    if expected == "number":
        return is_number(value) and -LARGEST <= value <= LARGEST
    if expected == "settings":
        return isinstance(value, dict) and _are_settings(value)
    if expected == "counts":
        return isinstance(value, dict) and all(_is_right("whole", count, width) for count in value.values())
    if expected == "row":
        return isinstance(value, list) and len(value) == width and all(map(is_number, value))
    if expected == "rows":
        return isinstance(value, list) and all(_is_right("row", row, width) for row in value)
    return True


def _are_settings(value: dict[str, Any]) -> bool:
    """Those that a reader goes by; the others are for people."""
    rate_hz, mode = value.get("rate_hz"), value.get("mode")
    return is_number(rate_hz) and 0 < rate_hz <= MAX_LOOP_HZ and mode in get_args(Mode)
