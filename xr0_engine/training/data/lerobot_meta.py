"""What a LeRobot dataset's meta folder says: its tasks, and where each episode lies, in v2.x and in v3.0."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, get_args

import pyarrow as pa

from xr0_engine.files import one_line, parse_json, read_bytes, read_json, text, whole
from xr0_engine.training.data.episode import Status
from xr0_engine.training.data.parquet import read_table
from xr0_engine.training.data.samples import DataError

INFO_FILE = Path("meta") / "info.json"
# Our own column of meta/episodes; absent from other datasets, whose episodes all count as successes.
STATUS_COLUMN = "xr0/trajectory_type"
# Of a frame: from there on a span reaches into the next frame.
SPAN_SLACK = 0.5
LINES_BYTES = 128 << 20
"""Of meta/episodes.jsonl and its like: a million episodes of a hundred bytes."""
LONGEST_EPISODE = 1 << 22
"""Rows, and ticks at the robot's rate: a day and a half at 30 Hz."""
LARGEST_NUMBER = 1 << 40
"""Of an episode, a file or a row of all episodes."""
_PLACES = re.compile(r"\{(episode_chunk|episode_index|chunk_index|file_index|video_key)(:0?\d?d)?\}")


@dataclass(frozen=True)
class Span:
    """Where an episode lies in a video file. start_s: time of its timestamp 0. end_s: exclusive; None: not told."""

    path: Path
    start_s: float = 0.0
    end_s: float | None = None


@dataclass(frozen=True)
class EpisodeEntry:
    """Where an episode lies.

    wordings: of its task, where the dataset is one of ours; otherwise the rows' task_index alone tells. data: the file
    of its rows; alone: no other episode's are in it. index_range: what the rows' `index` must lie in; None: not told.
    spans: video feature -> where. fault: why it cannot be used, found in the meta data; None: nothing was.
    """

    index: int
    length: int
    wordings: tuple[str, ...]
    status: Status
    data: Path
    alone: bool
    spans: Mapping[str, Span]
    index_range: range | None = None
    fault: str | None = None


def entries_v2(folder: Path, info: Mapping[str, Any], features: Collection[str]) -> list[EpisodeEntry]:
    """v2.0 and v2.1: a file per episode. Raises DataError, and KeyError for what the meta data lack."""
    file = folder / "meta" / "episodes.jsonl"
    entries = []
    for line in json_lines(file):
        index = _whole(file, line, "episode_index")
        place = {"episode_chunk": index // whole(info, "chunks_size", least=1), "episode_index": index}
        entries.append(
            EpisodeEntry(
                index=index,
                length=_whole(file, line, "length", least=1),
                wordings=(),
                status="success",
                data=file_at(folder, info, "data_path", place),
                alone=True,
                spans={f: Span(file_at(folder, info, "video_path", {**place, "video_key": f})) for f in features},
            )
        )
    return _without_doubles(file, entries)


def entries_v3(folder: Path, info: Mapping[str, Any], features: Collection[str]) -> list[EpisodeEntry]:
    """v3.0: files of many episodes. Raises DataError, and KeyError for what the meta data lack."""
    files = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    if not files:
        raise DataError("meta/episodes holds no parquet file")
    # Not the statistics of each episode, most of the file.
    wanted = {"episode_index", "length", "tasks", "data/chunk_index", "data/file_index", STATUS_COLUMN}
    wanted |= {"dataset_from_index", "dataset_to_index"}
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    wanted |= {f"videos/{feature}/{part}" for feature in features for part in parts}
    entries = []
    for file in files:
        for row in read_table(file, wanted).to_pylist():
            entry = EpisodeEntry(
                index=_whole(file, row, "episode_index"),
                length=_whole(file, row, "length", least=1),
                wordings=tuple(row.get("tasks") or ()) if STATUS_COLUMN in row else (),
                status=_status(file, row),
                data=file_at(folder, info, "data_path", _place(file, row, "data")),
                alone=False,
                spans={f: _span(folder, info, file, row, f) for f in features},
            )
            if row.get("dataset_from_index") is not None and row.get("dataset_to_index") is not None:
                bounds = range(row["dataset_from_index"], row["dataset_to_index"])
                entry = replace(entry, index_range=bounds)
            entries.append(entry)
    return _with_wrong_spans(_without_doubles(files[0].parent.parent, entries), float(info["fps"]))


def tasks_v2(folder: Path) -> dict[int, str]:
    """Task index -> words. Raises DataError for one that is told twice or without words."""
    file = folder / "meta" / "tasks.jsonl"
    lines = json_lines(file)
    for number, line in enumerate(lines):
        if not {"task_index", "task"} <= set(line):
            raise DataError(f"{file}: line {number + 1}: expected task_index and task, got {', '.join(line)}")
    return _tasks(file, [line["task_index"] for line in lines], [line["task"] for line in lines])


def tasks_v3(folder: Path) -> dict[int, str]:
    """Task index -> words. Raises DataError as tasks_v2, or if it is not clear which column they are."""
    file = folder / "meta" / "tasks.parquet"
    found = read_table(file)
    if "task_index" not in found.column_names:
        raise DataError(f"{file}: expected a column task_index, got {', '.join(found.column_names)}")
    return _tasks(file, found["task_index"].to_pylist(), found[_words_column(file, found)].to_pylist())


def _words_column(file: Path, found: Any) -> str:
    """pandas' index, which older files call __index_level_0__, or a column `task`; else the only column of text."""
    texts = [f.name for f in found.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    index = (found.schema.pandas_metadata or {}).get("index_columns", [])
    known = [name for name in texts if name in ("task", "__index_level_0__") or name in index]
    candidates = known or texts
    if not candidates:
        raise DataError(f"{file}: expected the tasks' words in a column of text, got {', '.join(found.column_names)}")
    if any(found[name].to_pylist() != found[candidates[0]].to_pylist() for name in candidates[1:]):
        raise DataError(f"{file}: {' and '.join(candidates)} both hold text: leave only the tasks' words in it")
    return str(candidates[0])


def _tasks(file: Path, numbers: list[Any], words: list[Any]) -> dict[int, str]:
    tasks: dict[int, str] = {}
    for place, (number, task) in enumerate(zip(numbers, words, strict=True)):
        if type(number) is not int or not isinstance(task, str):
            raise DataError(
                f"{file}: row {place}: expected a whole task_index and words, got {number!r:.80} and {task!r:.80}"
            )
        if number in tasks:
            raise DataError(f"{file}: task_index {number} stands for both {tasks[number]!r:.80} and {task!r:.80}")
        tasks[number] = task
    return tasks


def _status(file: Path, row: Mapping[str, Any]) -> Status:
    status: Status = row.get(STATUS_COLUMN, "success")
    if status not in get_args(Status):
        raise DataError(
            f"{file}: episode {row['episode_index']}: {STATUS_COLUMN}: expected one of {', '.join(get_args(Status))}, "
            f"got {status!r}"
        )
    return status


def _span(folder: Path, info: Mapping[str, Any], file: Path, row: Mapping[str, Any], feature: str) -> Span:
    prefix = f"videos/{feature}"
    path = file_at(folder, info, "video_path", {"video_key": feature, **_place(file, row, prefix)})
    # A missing time is refused below, with the episode's name.
    start_s = row[f"{prefix}/from_timestamp"]
    return Span(path, math.nan if start_s is None else float(start_s), row.get(f"{prefix}/to_timestamp"))


def _with_wrong_spans(entries: list[EpisodeEntry], fps: float) -> list[EpisodeEntry]:
    """The entries, those marked whose spans are no times, or share pictures with another episode's."""
    slack_s = SPAN_SLACK / fps
    faults: dict[int, str] = {}
    files: dict[Path, list[tuple[float, float, int, str]]] = {}
    for number, entry in enumerate(entries):
        for feature, span in entry.spans.items():
            end_s = span.start_s + entry.length / fps if span.end_s is None else span.end_s
            if not -slack_s < span.start_s < end_s < math.inf:
                faults[number] = (
                    f"meta/episodes: videos/{feature}: expected 0 <= from_timestamp < to_timestamp, got "
                    f"{span.start_s} and {span.end_s}"
                )
            else:
                files.setdefault(span.path, []).append((span.start_s, end_s, number, feature))
    for path, taken in files.items():
        for (_, end_s, first, feature), (start_s, _, second, _) in pairwise(sorted(taken)):
            if start_s < end_s - slack_s:
                for number, other in ((first, second), (second, first)):
                    faults[number] = (
                        f"meta/episodes: videos/{feature}: its from_timestamp and to_timestamp in {path} overlap those "
                        f"of episode {entries[other].index}"
                    )
    return [replace(entry, fault=faults.get(number, entry.fault)) for number, entry in enumerate(entries)]


def _without_doubles(file: Path, entries: list[EpisodeEntry]) -> list[EpisodeEntry]:
    known: set[int] = set()
    for entry in entries:
        if entry.index in known:
            raise DataError(f"{file}: lists episode {entry.index} more than once")
        known.add(entry.index)
    return entries


def file_at(folder: Path, info: Mapping[str, Any], name: str, place: Mapping[str, Any]) -> Path:
    """The file that a path of info.json stands for. place: what stands in its braces.

    Raises DataError for a path that leads out of the folder, and for anything in its braces but a name and a number of
    digits: Python would fill gigabytes, or look into objects, as it is told there.
    """
    pattern = text(info, name)
    parts = PurePosixPath(pattern).parts
    if PurePosixPath(pattern).is_absolute() or ".." in parts or set("{}") & set(_PLACES.sub("", pattern)):
        raise DataError(
            f"{INFO_FILE}: {name}: expected a path in the dataset with places such as {{episode_index:06d}}, got "
            f"{pattern!r:.120}"
        )
    return folder / pattern.format(**place)


def _place(file: Path, row: Mapping[str, Any], prefix: str) -> dict[str, int]:
    return {name: _whole(file, row, f"{prefix}/{name}") for name in ("chunk_index", "file_index")}


def _whole(file: Path, row: Mapping[str, Any], name: str, least: int = 0) -> int:
    value = row[name]
    most = LONGEST_EPISODE if name == "length" else LARGEST_NUMBER
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        episode = f"episode {row['episode_index']}: " if name != "episode_index" else ""
        range_ = f"from {least}" if type(value) is not int or value < least else f"of at most {most}"
        raise DataError(f"{file}: {episode}{name}: expected a whole number {range_}, got {value!r:.80}")
    return value


def json_object(path: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        value = read_json(path, DataError)
    except OSError as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Raises DataError."""
    lines = []
    try:
        # Not splitlines: within a task's words there may be other ends of lines, which JSON need not escape.
        for line in read_bytes(path, DataError, LINES_BYTES).split(b"\n"):
            if line.strip():
                lines.append(parse_json(line))
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {one_line(error)}") from None
    if not all(isinstance(line, dict) for line in lines):
        raise DataError(f"{path}: expected a JSON object a line")
    return lines
