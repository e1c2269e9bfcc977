"""An episode's rows out of a LeRobot dataset's tables, and the time of each: timestamp = frame_index / fps."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from xr0_engine.training.data.lerobot_meta import INFO_FILE, EpisodeEntry
from xr0_engine.training.data.parquet import read_schema, read_table, reading
from xr0_engine.training.data.samples import DataError

# LeRobot's own: how far a picture may be from the row that asks for it.
TOLERANCE_S = 1e-4
# Of the distance between rows: from there on they were recorded at another rate than the meta data say.
RATE_SLACK = 0.01
MILLISECONDS = 1000
# Data files of which a process keeps whose rows they hold.
KNOWN_FILES = 1024


@dataclass(frozen=True, eq=False)
class Rows:
    """An episode's rows in order of time.

    values: feature -> (N, width). tasks: (N,) int64, task indices. frames: (N,) int64, rising: which frame of the
    episode each row is of, at fps; more than 1 apart where the table lacks rows.
    """

    values: Mapping[str, np.ndarray]
    tasks: np.ndarray
    frames: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """The rows after which others are missing."""
        return np.flatnonzero(np.diff(self.frames) > 1)


def read_rows(entry: EpisodeEntry, features: Collection[str], fps: float) -> Rows:
    """The rows of an episode. Raises DataError that names file, column and row, but not the episode."""
    entry = _with_its_file(entry)
    found = _table(entry, features)
    with reading(entry.data):
        columns = {name: _column(found, name) for name in found.column_names}
        clocks = [columns[name][:, 0] if name in columns else None for name in ("timestamp", "frame_index")]
        frames = frames_of(clocks[0], clocks[1], fps)
        order = np.argsort(frames, kind="stable")
        _check_order(entry, frames[order], order, columns.get("index"))
        tasks = _whole_numbers(columns["task_index"][:, 0], "task_index")[order]
    return Rows({name: columns[name][order] for name in features}, tasks, frames[order])


def frames_of(timestamps: np.ndarray | None, numbers: np.ndarray | None, fps: float) -> np.ndarray:
    """(N,) int64: which frame each row is of. timestamps: (N,) s. numbers: (N,), the column frame_index.

    Either may be absent. Raises DataError if both are, or for rows that have no such frame or two of them.
    """
    if timestamps is None and numbers is None:
        raise DataError("expected a column timestamp or frame_index: neither tells the time of a row")
    counted = None if numbers is None else _whole_numbers(numbers, "frame_index")
    if timestamps is None:
        assert counted is not None
        return counted
    if not np.issubdtype(timestamps.dtype, np.number) or not np.isfinite(timestamps).all():
        raise DataError("timestamp: expected finite numbers of seconds")
    _check_rate(timestamps.astype(np.float64), fps)
    frames = np.rint(timestamps.astype(np.float64) * fps).astype(np.int64)
    off_s = np.abs(timestamps.astype(np.float64) - frames / fps)
    # A timestamp is as exact as its type can write it.
    wrong = np.flatnonzero(off_s > TOLERANCE_S + np.spacing(np.abs(timestamps)))
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"row {row}: timestamp {float(timestamps[row]):.6g} s is {off_s[row]:.2g} s off the nearest frame at "
            f"{fps:g} Hz, more than the {TOLERANCE_S:g} s that LeRobot allows: write frame_index / fps"
        )
    if counted is not None and (frames != counted).any():
        row = int(np.argmax(frames != counted))
        raise DataError(
            f"row {row}: timestamp {float(timestamps[row]):.6g} s is frame {frames[row]} at {fps:g} Hz, frame_index "
            f"says {counted[row]}: correct the one that its picture does not follow (LeRobot goes by timestamp)"
        )
    return frames


def _check_rate(timestamps: np.ndarray, fps: float) -> None:
    if len(timestamps) < 2:
        return
    # Rows may be in any order, and some may be missing; most are one frame apart.
    apart_s = float(np.median(np.diff(np.sort(timestamps))))
    if apart_s <= 0 or abs(apart_s * fps - 1) <= RATE_SLACK:
        return
    are_milliseconds = abs(apart_s * fps / MILLISECONDS - 1) < RATE_SLACK
    raise DataError(
        f"timestamp: rows are {apart_s:.6g} apart, {INFO_FILE} says fps {fps:g}, that is {1 / fps:.6g} s: "
        + ("write seconds, not milliseconds" if are_milliseconds else "correct one of them")
    )


def _check_order(entry: EpisodeEntry, frames: np.ndarray, order: np.ndarray, index: np.ndarray | None) -> None:
    """frames: rising. order: the row of the table that each is. index: (N, 1), as in the table."""
    if frames[0] < 0:
        raise DataError(f"row {order[0]}: expected a time from 0, got frame {frames[0]}")
    steps = np.diff(frames)
    if (steps == 0).any():
        place = int(np.argmax(steps == 0))
        raise DataError(f"rows {order[place]} and {order[place + 1]} are both frame {frames[place]}: leave one out")
    if len(steps) and np.median(steps) > 1:
        raise DataError(
            f"frame_index: most rows are {np.median(steps):g} frames apart: {INFO_FILE} must say the rate of the rows"
        )
    if index is None:
        return
    ordered = index[:, 0][order]
    if (np.diff(ordered) <= 0).any():
        place = int(np.argmax(np.diff(ordered) <= 0))
        raise DataError(
            f"rows {order[place]} and {order[place + 1]}: index {ordered[place]} and {ordered[place + 1]} go another "
            "way than their times: number the rows anew"
        )
    told = entry.index_range
    if told is not None and not told.start <= ordered[0] <= ordered[-1] < told.stop:
        raise DataError(
            f"index goes from {ordered[0]} to {ordered[-1]}, meta/episodes say dataset_from_index {told.start} and "
            f"dataset_to_index {told.stop}: number the rows anew"
        )


def _with_its_file(entry: EpisodeEntry) -> EpisodeEntry:
    """The entry with the data file that holds its episode.

    Published datasets are known whose data/file_index is wrong; LeRobot never reads it but goes by the rows of all data
    files. The entry stays as it is if none of them holds the episode, or more than one.
    """
    if entry.alone or not entry.data.is_file() or entry.index in _episodes_in(entry.data):
        return entry
    others = sorted(entry.data.parent.parent.glob("*/*.parquet"))
    holding = [path for path in others if entry.index in _episodes_in(path)]
    return replace(entry, data=holding[0]) if len(holding) == 1 else entry


def _episodes_in(path: Path) -> frozenset[int]:
    stat = path.stat()
    return _read_episodes(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=KNOWN_FILES)
def _read_episodes(path: Path, size: int, changed_ns: int) -> frozenset[int]:
    """A file that was replaced is another file. One that cannot be read holds none, and is told of where it is read."""
    try:
        with reading(path):
            return frozenset(_plain(read_table(path, ["episode_index"])["episode_index"]).unique().to_pylist())
    except (DataError, KeyError):
        return frozenset()


def _plain(column: Any) -> Any:
    """Some write a feature of shape [1] as lists of one number. Raises DataError for what has values within values."""
    if not _is_list(column.type) and pa.types.is_nested(column.type):
        raise DataError(f"expected numbers, or lists of them, got {column.type}")
    return pc.list_flatten(column) if _is_list(column.type) else column


def _is_list(kind: Any) -> bool:
    return any(holds(kind) for holds in (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list))


def _table(entry: EpisodeEntry, features: Collection[str]) -> Any:
    """The columns of an episode's rows, in order of the file. Raises DataError."""
    needed = {*features, "task_index", "episode_index"}
    schema = read_schema(entry.data)
    missing = sorted(needed - set(schema.names))
    if missing:
        raise DataError(f"{entry.data}: expected a column {missing[0]!r}, got {', '.join(schema.names)}")
    is_nested = _is_list(schema.field("episode_index").type)
    filters = None if entry.alone or is_nested else [("episode_index", "=", entry.index)]
    found = read_table(entry.data, needed | {"timestamp", "frame_index", "index"}, filters)
    with reading(entry.data):
        if is_nested and not entry.alone:
            found = found.filter(pc.equal(_plain(found["episode_index"]), entry.index))
        held = _plain(found["episode_index"]).unique().to_pylist()
    if any(index != entry.index for index in held):
        raise DataError(f"{entry.data}: expected rows of episode {entry.index} alone, episode_index says {held}")
    if found.num_rows != entry.length:
        raise DataError(f"{entry.data} has {found.num_rows} rows of it, the meta data say length {entry.length}")
    return found.drop_columns(["episode_index"])


def _column(found: Any, name: str) -> np.ndarray:
    """(N, width) of numbers. Raises DataError for other kinds, for rows without a value and of several widths."""
    column = found[name]
    if column.null_count:
        raise DataError(f"{name} has rows without a value")
    inner = column.type.value_type if _is_list(column.type) else column.type
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)):
        raise DataError(f"{name}: expected numbers, or lists of them, got {column.type}")
    if not _is_list(column.type):
        values = column.to_numpy()
    else:
        widths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(widths) != 1:
            raise DataError(f"{name}: expected rows of one width, got {sorted(widths)}")
        values = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])
    return np.asarray(values).reshape(found.num_rows, -1)


def _whole_numbers(values: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.number) or not (np.isfinite(values) & (values == np.rint(values))).all():
        raise DataError(f"{name}: expected whole numbers")
    return values.astype(np.int64)
