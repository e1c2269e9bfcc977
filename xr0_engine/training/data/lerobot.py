"""LeRobot datasets, v2.0 and v2.1 (a file per episode) and v3.0 (files of many episodes): parquet and MP4."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from xr0_engine.robot.decode import rotation_exp
from xr0_engine.training.data.description import COLUMNS, PART_WIDTHS, ROTATIONS, Description, Selector
from xr0_engine.training.data.episode import PARTS, Episode, Status, part_columns, poses_of
from xr0_engine.training.data.motion import BimanualMotion, Motion, PlainMotion, resampled_ticks
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip

INFO_FILE = Path("meta") / "info.json"
# Our own column of meta/episodes; absent from other datasets, whose episodes all count as successes.
STATUS_COLUMN = "xr0/trajectory_type"


@dataclass(frozen=True)
class EpisodeEntry:
    """Where an episode lies. starts_s: video feature -> time of its first frame in the file."""

    index: int
    length: int
    tasks: tuple[str, ...]
    status: Status
    data: Path
    videos: Mapping[str, Path]
    starts_s: Mapping[str, float]


class LeRobotDataset:
    """The episodes of a LeRobot dataset, as its description maps them. Raises DataError for a wrong file or mapping."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.path = description.folder
        info = _json(self.path / INFO_FILE)
        try:
            self._version = str(info["codebase_version"])
            self._features: Mapping[str, Any] = info["features"]
            self._fps = float(info["fps"])
            self._info = info
            if not self._version.startswith(("v2.", "v3.")):
                raise DataError(f"codebase_version {self._version!r}: expected v2.0, v2.1 or v3.0")
            self._check_mapping()
            entries = self._entries_v3() if self._version.startswith("v3.") else self._entries_v2()
        except KeyError as error:
            raise DataError(f"{self.path}: its meta data lack {error.args[0]!r}") from None
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None
        self.entries = tuple(entries)
        self.rate_hz = description.embodiment.control_rate_hz

    @property
    def names(self) -> list[str]:
        return [f"{self.path}#{entry.index}" for entry in self.entries]

    @property
    def lengths(self) -> list[int]:
        return [len(resampled_ticks(entry.length, self._fps, self.rate_hz)) for entry in self.entries]

    @property
    def statuses(self) -> list[Status]:
        return [entry.status for entry in self.entries]

    def load(self, number: int) -> Episode:
        """The episode at a place in `entries`. Raises DataError."""
        entry = self.entries[number]
        name = self.names[number]
        rows = self._rows(entry, name)
        ticks = resampled_ticks(entry.length, self._fps, self.rate_hz)
        try:
            motion = self._motion(rows, ticks)
        except ValueError as error:
            raise DataError(f"{name}: {error}") from None
        tasks = rows["task_index"][ticks, 0].astype(np.int64)
        if (tasks == tasks[0]).all():
            instructions, tasks_at = entry.tasks, None
        else:
            known, tasks_at = np.unique(tasks, return_inverse=True)
            instructions = tuple(self._tasks[int(task)] for task in known)
        return Episode(
            name=name,
            status=entry.status,
            instructions=instructions,
            clips={
                view: Clip(entry.videos[feature], entry.starts_s[feature], entry.length, self._fps)
                for view, feature in self.description.views.items()
            },
            motion=motion,
            rate_hz=self.rate_hz,
            instruction_at=tasks_at,
        )

    def _check_mapping(self) -> None:
        mapped = self.description
        for view, feature in mapped.views.items():
            kind = self._features.get(feature, {}).get("dtype")
            if kind == "image":
                raise DataError(f"views.{view}: {feature!r} holds images in parquet; only videos are read")
            if kind != "video":
                videos = [name for name, it in self._features.items() if it["dtype"] == "video"]
                raise DataError(f"views.{view}: expected one of {', '.join(videos)}, got {feature!r}")
        for (arm, part), mapping in mapped.arms.items():
            width = ROTATIONS[mapping.rotation] if part == "rotation" else PART_WIDTHS[part]
            self._columns(mapping.state, width, f"arms.{arm}.{part}.state")
            self._columns(mapping.action, width, f"arms.{arm}.{part}.action")
        for kind, entries in (("state", mapped.state), ("action", mapped.action)):
            for number, entry in enumerate(entries):
                width = entry.columns.stop - entry.columns.start
                self._columns(entry.source, width, f"{kind}[{number}].from")
                if entry.minus:
                    self._columns(entry.minus, width, f"{kind}[{number}].minus")
        if not mapped.arms and not (mapped.state and mapped.action):
            wanted = " and ".join(mapped.embodiment.action_layout.described_by)
            features = ", ".join(f"{name} {self._names(name)}" for name in self._features if "image" not in name)
            raise DataError(f"the description lacks {wanted}; the dataset has {features}")

    def _columns(self, selector: Selector, width: int, where: str) -> list[int]:
        feature = self._features.get(selector.feature)
        if feature is None or len(feature["shape"]) != 1:
            raise DataError(f"{where}: {selector.feature!r} is no feature of numbers of this dataset")
        columns = selector.columns(self._names(selector.feature), int(feature["shape"][0]))
        if len(columns) != width:
            raise DataError(f"{where}: expected {width} columns, got {len(columns)}")
        return columns

    def _names(self, feature: str) -> list[str]:
        names = self._features[feature].get("names") or []
        if isinstance(names, Mapping):
            names = [name for group in names.values() if isinstance(group, list) for name in group]
        return [str(name) for name in names]

    def _pick(self, selector: Selector, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        values = rows[selector.feature]
        picked = values[:, selector.columns(self._names(selector.feature), values.shape[1])].astype(np.float64)
        wrong = np.flatnonzero(~np.isfinite(picked).all(axis=1))
        if len(wrong):
            raise DataError(f"frame {wrong[0]}: {selector.feature}: expected finite numbers, got NaN or infinity")
        return picked

    def _motion(self, rows: Mapping[str, np.ndarray], ticks: np.ndarray) -> Motion:
        mapped = self.description
        if mapped.arms:
            parts: list[dict[tuple[str, str], np.ndarray]] = [{}, {}]
            for key, mapping in mapped.arms.items():
                for values, selector in zip(parts, (mapping.state, mapping.action), strict=True):
                    picked = self._pick(selector, rows)[ticks]
                    values[key] = _matrices(picked, mapping.rotation) if key[1] == "rotation" else picked
            present = {(arm, part): (arm, part) in mapped.arms for arm in ("left", "right") for part in PARTS}
            proprios, targets = (poses_of(values, len(ticks)) for values in parts)
            return BimanualMotion(proprios, targets, part_columns(present))
        states, actions, origins = np.zeros((3, len(ticks), COLUMNS))
        columns = np.zeros(COLUMNS, bool)
        for entry in mapped.state:
            states[:, entry.columns] = self._pick(entry.source, rows)[ticks]
        for entry in mapped.action:
            actions[:, entry.columns] = self._pick(entry.source, rows)[ticks]
            columns[entry.columns] = True
            if entry.minus is not None:
                origins[:, entry.columns] = self._pick(entry.minus, rows)[ticks]
        return PlainMotion(states.astype(np.float32), actions, origins, columns)

    def _rows(self, entry: EpisodeEntry, name: str) -> dict[str, np.ndarray]:
        """Feature -> (N, width), of the features that the description uses, in order of the frames."""
        mapped = self.description
        selectors = [s for part in mapped.arms.values() for s in (part.state, part.action)]
        for column in (*mapped.state, *mapped.action):
            selectors += [column.source, *([column.minus] if column.minus else [])]
        features = sorted({selector.feature for selector in selectors} | {"task_index", "frame_index"})
        try:
            table = pq.read_table(entry.data, columns=features, filters=[("episode_index", "=", entry.index)])
        except (OSError, ValueError) as error:
            raise DataError(f"{name}: {entry.data} cannot be read: {error}") from None
        if table.num_rows != entry.length:
            raise DataError(f"{name}: {entry.data} has {table.num_rows} rows of it, the meta data say {entry.length}")
        order = np.argsort(table["frame_index"].to_numpy(), kind="stable")
        rows = {}
        for feature in features:
            if table[feature].null_count:
                raise DataError(f"{name}: {entry.data}: {feature} has rows without a value")
            column = table[feature].combine_chunks()
            flat = column.flatten() if hasattr(column, "flatten") and column.type.num_fields else column
            rows[feature] = flat.to_numpy(zero_copy_only=False).reshape(table.num_rows, -1)[order]
        return rows

    @cached_property
    def _tasks(self) -> dict[int, str]:
        """Task index -> words."""
        if self._version.startswith("v3."):
            path = self.path / "meta" / "tasks.parquet"
            table = _table(path)
            # pandas' index: the words are a column of another name than `task` in files of some versions.
            words = next(name for name in table.column_names if name != "task_index")
            return dict(zip(table["task_index"].to_pylist(), table[words].to_pylist(), strict=True))
        return {line["task_index"]: line["task"] for line in _json_lines(self.path / "meta" / "tasks.jsonl")}

    def _entries_v2(self) -> list[EpisodeEntry]:
        info, features = self._info, sorted(set(self.description.views.values()))
        entries = []
        for line in _json_lines(self.path / "meta" / "episodes.jsonl"):
            index = int(line["episode_index"])
            place = {"episode_chunk": index // int(info["chunks_size"]), "episode_index": index}
            entries.append(
                EpisodeEntry(
                    index=index,
                    length=int(line["length"]),
                    tasks=tuple(line["tasks"]),
                    status="success",
                    data=self.path / info["data_path"].format(**place),
                    videos={f: self.path / info["video_path"].format(**place, video_key=f) for f in features},
                    starts_s=dict.fromkeys(features, 0.0),
                )
            )
        return entries

    def _entries_v3(self) -> list[EpisodeEntry]:
        info, features = self._info, sorted(set(self.description.views.values()))
        entries = []
        files = sorted((self.path / "meta" / "episodes").glob("*/*.parquet"))
        if not files:
            raise DataError("meta/episodes holds no parquet file")
        # Not the statistics of each episode, most of the file.
        wanted = {"episode_index", "length", "tasks", "data/chunk_index", "data/file_index", STATUS_COLUMN}
        wanted |= {f"videos/{f}/{name}" for f in features for name in ("chunk_index", "file_index", "from_timestamp")}
        for row in (row for file in files for row in _table(file, wanted).to_pylist()):
            videos = {f: info["video_path"].format(video_key=f, **_place(row, f"videos/{f}")) for f in features}
            entries.append(
                EpisodeEntry(
                    index=int(row["episode_index"]),
                    length=int(row["length"]),
                    tasks=tuple(row["tasks"]),
                    status=row.get(STATUS_COLUMN, "success"),
                    data=self.path / info["data_path"].format(**_place(row, "data")),
                    videos={f: self.path / path for f, path in videos.items()},
                    starts_s={f: float(row[f"videos/{f}/from_timestamp"]) for f in features},
                )
            )
        return entries


def _place(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: row[f"{prefix}/{name}"] for name in ("chunk_index", "file_index")}


def _matrices(values: np.ndarray, written_as: str) -> np.ndarray:
    """Rotations (N, k) as matrices, (N, 9) row by row."""
    if written_as == "matrix":
        return values
    if written_as == "axis_angle":
        return rotation_exp(values).reshape(-1, 9)
    w, x, y, z = np.moveaxis(values if written_as == "quaternion_wxyz" else np.roll(values, 1, axis=1), 1, 0)
    norm = np.sqrt(w**2 + x**2 + y**2 + z**2)
    if (norm == 0).any():
        raise DataError(f"frame {np.flatnonzero(norm == 0)[0]}: expected a quaternion, got zeros")
    w, x, y, z = w / norm, x / norm, y / norm, z / norm
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([value for row in rows for value in row], axis=1)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object")
    return value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON lines: {error}") from None


def _table(path: Path, wanted: Collection[str] | None = None) -> Any:
    """A parquet file, or those of the wanted columns that it has."""
    try:
        names = pq.read_schema(path).names
        return pq.read_table(path, columns=[name for name in names if wanted is None or name in wanted])
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None
