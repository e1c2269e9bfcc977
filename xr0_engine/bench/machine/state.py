"""What was run in a folder and how it ended: state.json, whole or not at all, so that any run can be gone on with."""

from __future__ import annotations

import fcntl
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from xr0_engine.bench import results
from xr0_engine.bench.results import Result, utc_now
from xr0_engine.files import number, parse_json, read_bytes, reading, section, text, whole
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

SCHEMA = 1
FILE, FACTS, RESULTS, LOGS, PAGE = "state.json", "machine.json", "results", "logs", "report.html"
"""What a folder holds."""
PASSED, LEFT_OUT, FAILED, CRASHED = "passed", "left out", "failed", "crashed"
TIMED_OUT, CUT_SHORT, INTERRUPTED, KILLED = "timed out", "cut short", "interrupted", "killed"
"""Cut short: its time was up, and what it had measured was kept. Interrupted: it was running when the run was ended.
Killed: it was running when the run was killed, or the machine went down."""
FAULTS = (FAILED, CRASHED, TIMED_OUT)


@dataclass(frozen=True)
class Ended:
    """How a step ended. reason: why, if it did not pass. exit: its code, None if it was not begun or not waited for."""

    verdict: str
    reason: str = ""
    seconds: float = 0.0
    limit_s: float = 0.0
    exit: int | None = None


@dataclass
class State:
    """same: what a run must have in common with the one before to go on with it. run: marks its processes. told: what
    else there is to say. parts: part -> its steps. ended: step -> how; running: the step that is."""

    folder: Path
    same: Mapping[str, Any]
    told: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, list[str]] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    running: str | None = None
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: str = field(default_factory=utc_now)

    def verdict(self, step: str) -> str | None:
        """None if it was never begun."""
        return self.ended[step].verdict if step in self.ended else None

    def ran(self, part: str) -> list[str]:
        """The verdicts of a part's steps that were begun."""
        verdicts = [self.verdict(step) for step in self.parts.get(part, [])]
        return [verdict for verdict in verdicts if verdict not in (None, LEFT_OUT)]

    def write(self) -> None:
        """Raises OSError; the file that was there is then as it was."""
        content = {name: value for name, value in vars(self).items() if name != "folder"}
        ended = {name: asdict(each) for name, each in self.ended.items()}
        write_whole(self.folder / FILE, json.dumps({"schema": SCHEMA, **content, "ended": ended}, indent=1) + "\n")


def read(folder: Path) -> State:
    """Raises ValueError for a folder that holds no run, or a broken one."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no run of `xr0 bench machine`: there is no {FILE}")
    data = read_bytes(path, FileError)
    with reading(f"{path} is corrupt", FileError, "; remove it to begin anew"):
        content = parse_json(data)
        if whole(content, "schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}")
        if unknown := content.keys() - {"schema", *(part.name for part in fields(State) if part.name != "folder")}:
            raise ValueError(f"unknown {sorted(unknown)!r:.80}")
        ends, parts = section(content, "ended"), section(content, "parts")
        return State(
            folder,
            same=section(content, "same"),
            told=dict(section(content, "told")),
            parts={part: [text({part: step}, part) for step in steps] for part, steps in parts.items()},
            ended={step: _ended(section(ends, step)) for step in ends},
            running=None if content.get("running") is None else text(content, "running"),
            run=text(content, "run"),
            created=text(content, "created"),
        )


def _ended(raw: Mapping[str, Any]) -> Ended:
    """Raises KeyError, TypeError or ValueError."""
    if unknown := raw.keys() - {part.name for part in fields(Ended)}:
        raise ValueError(f"unknown {sorted(unknown)!r:.80}")
    return Ended(
        verdict=text(raw, "verdict"),
        reason=text(raw, "reason", ""),
        seconds=number(raw, "seconds", 0.0),
        limit_s=number(raw, "limit_s", 0.0),
        exit=None if raw.get("exit") is None else whole(raw, "exit"),
    )


def go_on(folder: Path, same: Mapping[str, Any]) -> State:
    """The folder's run, or a new one.

    Raises ValueError, naming what differs, if the run there is another machine's or commit's.
    """
    if not (folder / FILE).exists():
        return State(folder, same)
    state = read(folder)
    others = [name for name in same if state.same.get(name) != same[name]]
    if others:
        told = ", ".join(f"{name} {state.same.get(name)!r} (now {same[name]!r})" for name in others)
        raise ValueError(f"--out: {folder} holds a run with {told}; take another folder")
    if state.running is not None:
        state.ended[state.running] = Ended(KILLED, "it was running when the run was killed, or the machine went down")
        state.running = None
    return state


def results_of(folder: Path) -> list[tuple[str, Result]]:
    """(file name, result) of every measurement in the folder; what other commands printed is left out.

    Raises ValueError for one that is broken.
    """
    found = ((path.name, check(path)) for path in sorted((folder / RESULTS).glob("*.json")))
    return [(name, result) for name, result in found if result is not None]


def check(path: Path) -> Result | None:
    """The measurement in a file, None if it is what another command printed. Raises ValueError for a broken one."""
    content = printed(path)
    return results.read(path) if isinstance(content, dict) and "schema" in content else None


def printed(path: Path) -> Any:
    """JSON that a command printed, None if there is none. Raises ValueError for what is not JSON."""
    if not path.is_file():
        return None
    data = read_bytes(path, FileError)
    with reading(f"{path} is not valid JSON", FileError):
        # What failed may have an error of NaN.
        return parse_json(data, finite=False)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One run at a time in a folder. Raises ValueError if there is one."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"--out: another run is at work in {folder}") from None
        yield
