"""Results as a folder: `run.json`, what all episodes share, and `episodes.jsonl`, a line for each as it ends.

A run that is killed leaves a valid folder: a line counts when its end is on the disk, and the next run on the folder
cuts off what is left of one that was not finished. Written and read here alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO, get_args

from xr0_engine.evaluation.benchmark import Episode, Mode, Run
from xr0_engine.files import json_lines, read_json
from xr0_engine.types import FileError
from xr0_engine.whole import only_writer, write_whole

SCHEMA = 1
RUN_FILE = "run.json"
EPISODES_FILE = "episodes.jsonl"
VIDEO_FOLDER = "videos"
VIEW_FOLDER = "rerun"

Key = tuple[str, int, int, str, float]
"""Suite, task, trial, mode, delay: Trial.key and Episode.key."""

# Of a run that is continued, these may differ: when it began, and where a server is, say nothing about its episodes.
_FREE = {"created", "policy.title"}


@dataclass(frozen=True)
class Results:
    """A results folder, read. episodes: in the order in which they ended. planned: how many it is to hold."""

    folder: Path
    run: Run
    episodes: tuple[Episode, ...]
    planned: int


class Writer:
    """Adds episodes to a folder, which is made, or continued if it holds episodes of the same run.

    planned: the trials to come, those included that are done. One process at a time has a folder. Raises ValueError,
    naming every field, for a folder of another run, for one that another process is writing to, and for a broken one,
    as read_results; OSError if the folder cannot be written. Close it, or use it as a context manager.
    """

    def __init__(self, folder: Path, run: Run, planned: Iterable[Key] = ()) -> None:
        self.folder = folder
        with ExitStack() as stack:
            stack.enter_context(only_writer(folder))
            # Unbuffered: what a write that failed has left must not be written later.
            self._file: BinaryIO = stack.enter_context(open(folder / EPISODES_FILE, "ab", buffering=0))
            self.done = self._begin(run)
            self._write_run(len({*self.done, *planned}))
            self._held = stack.pop_all()

    def add(self, episode: Episode) -> None:
        """Write an episode's line; it is on the disk when this returns.

        Raises ValueError for an episode that read_results would refuse, or that is there already; OSError, the folder
        valid as it was, if the disk takes no more.
        """
        line = {"run": _short(self.run), **asdict(episode)}
        text = json.dumps(line, allow_nan=False)
        _episode(json.loads(text), self.run, "episode")
        if episode.key in self.done:
            raise ValueError(f"episode: {_named(episode.key)} is in {self.folder / EPISODES_FILE} already")
        try:
            _write_all(self._file, text.encode() + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self._length)
            raise OSError(
                error.errno,
                f"{self.folder / EPISODES_FILE}: {os.strerror(error.errno or 0)}. What is written so far is valid; "
                "make room, then run the same command again to go on",
            ) from None
        self._length += len(text.encode()) + 1
        self.done[episode.key] = episode

    def close(self) -> None:
        """Let go of the folder."""
        self._held.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _begin(self, run: Run) -> dict[Key, Episode]:
        self.run, self._length = run, os.fstat(self._file.fileno()).st_size
        if not (self.folder / RUN_FILE).exists():
            if self._length:
                raise ValueError(f"{self.folder} holds {EPISODES_FILE} without {RUN_FILE}: take another folder")
            return {}
        results = read_results(self.folder)
        if found := differences(results.run, run):
            raise ValueError(
                f"out: {self.folder} holds a run that differs from this one. {'; '.join(found)}. Take another folder, "
                "or run what it was made with to go on"
            )
        self.run = results.run
        self._length = _whole_length(self.folder / EPISODES_FILE)
        self._file.truncate(self._length)
        return {episode.key: episode for episode in results.episodes}

    def _write_run(self, planned: int) -> None:
        content = {"schema": SCHEMA, "planned": planned, **asdict(self.run)}
        text = json.dumps(content, indent=1, allow_nan=False)
        _run(json.loads(text), "run")
        write_whole(self.folder / RUN_FILE, text + "\n")


def read_results(folder: Path) -> Results:
    """What Writer wrote; a last line that was cut off is left out.

    Raises FileError that names the file, the line and the field at fault, OSError if it cannot be read.
    """
    run_file, episodes_file = folder / RUN_FILE, folder / EPISODES_FILE
    if not run_file.is_file():
        raise FileError(f"{folder} holds no results of `xr0 eval`: it has no {RUN_FILE}")
    content = read_json(run_file, FileError)
    if not isinstance(content, dict):
        raise FileError(f"{run_file}: expected an object, got {content!r:.80}")
    run, planned = _run(content, str(run_file))
    episodes: dict[Key, Episode] = {}
    # A run that was killed at its very beginning has no such file.
    for number, line in json_lines(episodes_file, FileError) if episodes_file.exists() else ():
        where = f"{episodes_file}, line {number}"
        episode = _episode(line, run, where)
        if episode.key in episodes:
            raise FileError(f"{where}: {_named(episode.key)} is there twice")
        episodes[episode.key] = episode
    return Results(folder, run, tuple(episodes.values()), max(planned, len(episodes)))


def differences(one: Run, other: Run) -> list[str]:
    """Field by field, what tells two runs apart, time and title aside: `policy.dtype: 'bfloat16' before, ...`."""
    before, now = (_flat(json.loads(json.dumps(asdict(run)))) for run in (one, other))
    return [
        f"{name}: {_said(before.get(name))} before, {_said(now.get(name))} now"
        for name in dict.fromkeys([*before, *now])
        if name not in _FREE and before.get(name) != now.get(name)
    ]


def _whole_length(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


def _write_all(file: BinaryIO, data: bytes) -> None:
    # A raw file may take a part of it: the rest then tells why.
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_times(value: Any) -> bool:
    """None were measured, or both percentiles tell."""
    return isinstance(value, dict) and value.keys() in (set(), {"p50", "p99"}) and all(map(_is_number, value.values()))


def _is_inside(value: Any) -> bool:
    """A file within the folder, as a path that every system reads alike."""
    if value is None:
        return True
    path = PurePosixPath(value) if _is_text(value) and value and "\\" not in value else PurePosixPath("..")
    return not path.is_absolute() and ".." not in path.parts


_TEXT = _is_text, "text"
_COUNT = _is_count, "a whole number of at least 0"
_NUMBER = _is_number, "a number of at least 0"
_MAP = _is_map, "an object"
_TEXTS = _is_texts, "an object of texts"
_TIMES = _is_times, "an object of p50 and p99 in ms, or an empty one"

_RUN_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "benchmark": _TEXT,
    "protocol": _MAP,
    "versions": _TEXTS,
    "policy": _MAP,
    "execution": _MAP,
    "code": _MAP,
    "machine": _MAP,
    "created": _TEXT,
}
_EPISODE_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "suite": _TEXT,
    "task": _COUNT,
    "name": _TEXT,
    "trial": _COUNT,
    "seed": _COUNT,
    "mode": (lambda value: value in get_args(Mode), f"one of {', '.join(get_args(Mode))}"),
    "delay_steps": _NUMBER,
    "success": (lambda value: isinstance(value, bool), "true or false"),
    "solved": _COUNT,
    "rollouts": _COUNT,
    "steps": _COUNT,
    "calls": _COUNT,
    "latency_ms": _TIMES,
    "reaction_ms": _TIMES,
    "wall_s": _NUMBER,
    "error": (lambda value: value is None or _is_text(value), "text or null"),
    "repeats": _COUNT,
    "video": (_is_inside, "a file within the folder, or null"),
    "facts": _MAP,
}


def _run(content: dict[str, Any], where: str) -> tuple[Run, int]:
    """The run, and how many episodes are planned."""
    schema, planned = content.pop("schema", None), content.pop("planned", None)
    if schema != SCHEMA:
        raise FileError(f"{where}: schema: expected {SCHEMA}, got {schema!r}")
    if not _is_count(planned):
        raise FileError(f"{where}: planned: expected {_COUNT[1]}, got {planned!r:.80}")
    _check(content, _RUN_FIELDS, _needed(Run), where)
    return Run(**content), planned


def _episode(content: dict[str, Any], run: Run, where: str) -> Episode:
    said = content.pop("run", None)
    if said != _short(run):
        raise FileError(f"{where}: run: expected {_short(run)}, as in {RUN_FILE}, got {said!r:.200}")
    _check(content, _EPISODE_FIELDS, _needed(Episode), where)
    episode = Episode(**content)
    if not episode.solved <= episode.rollouts:
        raise FileError(f"{where}: solved: expected at most {episode.rollouts} rollouts, got {episode.solved}")
    if episode.success != (episode.solved == episode.rollouts > 0 and episode.error is None):
        raise FileError(
            f"{where}: success: expected true exactly if all rollouts are solved without an error, got "
            f"{episode.success} for {episode.solved} of {episode.rollouts}, error {episode.error!r:.80}"
        )
    return episode


def _check(
    content: Mapping[str, Any],
    expected: Mapping[str, tuple[Callable[[Any], bool], str]],
    needed: set[str],
    where: str,
) -> None:
    if unknown := content.keys() - expected.keys():
        raise FileError(f"{where}: {', '.join(sorted(unknown))}: unknown; expected {', '.join(expected)}")
    if missing := needed - content.keys():
        raise FileError(f"{where}: {', '.join(sorted(missing))}: missing")
    for name, value in content.items():
        holds, what = expected[name]
        if not holds(value):
            raise FileError(f"{where}: {name}: expected {what}, got {value!r:.80}")


def _needed(noun: type[Run] | type[Episode]) -> set[str]:
    return {each.name for each in fields(noun) if each.default is MISSING and each.default_factory is MISSING}


def _short(run: Run) -> dict[str, Any]:
    """What every line repeats of its run, so that it can stand by itself."""
    found = {
        "versions": dict(run.versions),
        "checkpoint": run.policy.get("checkpoint"),
        "code": dict(run.code),
    }
    return json.loads(json.dumps(found))


def _flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{before}{name}.")
        else:
            found[before + name] = value
    return found


def _said(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.120}"


def _named(key: Key) -> str:
    suite, task, trial, mode, delay = key
    return f"suite {suite}, task {task}, trial {trial}, mode {mode}, delay {delay:g}"
