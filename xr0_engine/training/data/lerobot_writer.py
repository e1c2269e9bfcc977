"""Episodes of two arms into the files of a LeRobot v3.0 dataset, as LeRobot's own reader takes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from xr0_engine.training.data.episode import ARMS, PARTS, TIMELINE_HZ, Episode, arm_parts
from xr0_engine.training.data.lerobot_meta import INFO_FILE, STATUS_COLUMN
from xr0_engine.training.data.lerobot_stats import PictureStats, Stats, as_columns, as_json, combined, stats_of
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import EpisodeFolder, checked_instructions
from xr0_engine.training.data.video import video_writer

# v3.0 keeps many episodes in a file; so many give files of some hundred megabytes at usual sizes.
EPISODES_PER_FILE = 50
# LeRobot compares times in float32, to 1e-4 s: beyond 1024 s they are 1.2e-4 s apart.
SECONDS_PER_FILE = 1000.0
CHUNK_FILES = 1000
# Where LeRobot begins a new file when it adds episodes of its own.
FILE_SIZES = {"data_files_size_in_mb": 100, "video_files_size_in_mb": 200}
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FEATURE = {"proprios": "observation.state", "targets": "action"}
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")


class LeRobotWriter:
    """One file of data and one a view for some episodes at a time; then, once, what describes them."""

    def __init__(self, folder: Path, source: EpisodeFolder) -> None:
        self.folder, self.source = folder, source
        first = source.load(0)
        self.parts = _parts_of(first)
        self.shapes = {view: first.image(view, 0).shape for view in first.clips}
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.stats: list[dict[str, Stats]] = []
        self.frames = 0

    def write_files(self, advance: Callable[[], None]) -> None:
        """Raises DataError for an episode that cannot be read or is unlike the first. advance: called after each."""
        for file, numbers in enumerate(_files(self.source.lengths)):
            place = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
            self._write_file(place, numbers, advance)

    def _write_file(self, place: dict[str, int], numbers: Sequence[int], advance: Callable[[], None]) -> None:
        path = self.folder / DATA_PATH.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        frames_in_file = 0
        with ExitStack() as stack:
            write = {view: stack.enter_context(self._video(view, place)) for view in self.shapes}
            rows: pq.ParquetWriter | None = None
            for number in numbers:
                episode = checked_instructions(self.source.load(number))
                table = self._table(episode, number)
                rows = rows or stack.enter_context(pq.ParquetWriter(path, table.schema))
                rows.write_table(table)
                stats = {name: stats_of(_numbers(table[name])) for name in table.schema.names}
                for view in self.shapes:
                    seen = PictureStats(len(episode.motion))
                    for tick in range(len(episode.motion)):
                        frame = self._frame(episode, view, tick)
                        write[view](frame)
                        seen.see(tick, frame)
                    stats[_feature(view)] = seen.stats()
                self._note(episode, number, place, frames_in_file / TIMELINE_HZ, stats)
                frames_in_file += len(episode.motion)
                advance()

    def write_meta(self) -> None:
        """info, tasks, episodes and statistics; when all files are written."""
        episodes = self.folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), episodes)
        pq.write_table(_tasks_table(self.tasks), self.folder / "meta" / "tasks.parquet")
        whole = {feature: combined([stats[feature] for stats in self.stats]) for feature in self.stats[0]}
        (self.folder / "meta" / "stats.json").write_text(json.dumps(as_json(whole), indent=4), encoding="utf-8")
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.source.description.robot_type,
            "total_episodes": len(self.episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            **FILE_SIZES,
            "fps": int(TIMELINE_HZ),
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self._features(),
        }
        (self.folder / INFO_FILE).write_text(json.dumps(info, indent=4), encoding="utf-8")

    def mapping(self) -> dict[str, Any]:
        """The views and arms of the xr0.yaml that reads the dataset back."""
        arms: dict[str, dict[str, Any]] = {}
        begin = 0
        for arm, part in self.parts:
            end = begin + PARTS[part][1]
            sources = (f"{feature}[{begin}:{end}]" for feature in FEATURE.values())
            arms.setdefault(arm, {})[part] = dict(zip(("state", "action"), sources, strict=True))
            begin = end
        keys = [view.key for view in self.source.description.embodiment.views]
        return {"views": {view: _feature(view) for view in self.shapes if view in keys}, "arms": arms}

    def _video(self, view: str, place: dict[str, int]) -> Any:
        path = self.folder / VIDEO_PATH.format(video_key=_feature(view), **place)
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width, _ = self.shapes[view]
        return video_writer(path, width, height, TIMELINE_HZ)

    def _frame(self, episode: Episode, view: str, tick: int) -> np.ndarray:
        image = episode.image(view, tick)
        if image.shape != self.shapes[view]:
            raise DataError(f"{episode.name}: {view} is {image.shape}, the first episode's is {self.shapes[view]}")
        return image

    def _table(self, episode: Episode, number: int) -> Any:
        if set(episode.clips) != set(self.shapes):
            raise DataError(
                f"{episode.name}: has the views {', '.join(episode.clips)}, the first episode has "
                f"{', '.join(self.shapes)}, and LeRobot wants the same of all: convert them apart"
            )
        if _parts_of(episode) != self.parts:
            raise DataError(f"{episode.name}: reports other parts of the arms than the first episode")
        count = len(episode.motion)
        columns: dict[str, Any] = {}
        for which, feature in FEATURE.items():
            values = arm_parts(getattr(episode.motion, which))
            rows = np.concatenate([values[key] for key in self.parts], axis=1).astype(np.float32)
            flat = pa.array(rows.ravel())
            # LeRobot keeps a feature of one column as plain numbers.
            columns[feature] = flat if rows.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, rows.shape[1])
        task = self.tasks.setdefault(episode.instructions[0], len(self.tasks))
        for text in episode.instructions[1:]:
            self.tasks.setdefault(text, len(self.tasks))
        frames = np.arange(count)
        columns["timestamp"] = pa.array((frames / TIMELINE_HZ).astype(np.float32))
        indices = (frames, np.full(count, number), self.frames + frames, np.full(count, task))
        for name, column in zip(INDEX_COLUMNS, indices, strict=True):
            columns[name] = pa.array(column.astype(np.int64))
        return pa.table(columns)

    def _note(
        self, episode: Episode, number: int, place: dict[str, int], start_s: float, stats: dict[str, Stats]
    ) -> None:
        count = len(episode.motion)
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(episode.instructions),
            "length": count,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + count,
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            STATUS_COLUMN: episode.status,
        }
        row |= {f"data/{name}": value for name, value in place.items()}
        for view in self.shapes:
            prefix = f"videos/{_feature(view)}"
            row |= {f"{prefix}/{name}": value for name, value in place.items()}
            row |= {f"{prefix}/from_timestamp": start_s, f"{prefix}/to_timestamp": start_s + count / TIMELINE_HZ}
        self.episodes.append(row | as_columns(stats))
        self.stats.append(stats)
        self.frames += count

    def _features(self) -> dict[str, Any]:
        names = [f"{arm}_{PARTS[part][0]}_{n}" for arm, part in self.parts for n in range(PARTS[part][1])]
        features: dict[str, Any] = {
            feature: {"dtype": "float32", "shape": [len(names)], "names": names} for feature in FEATURE.values()
        }
        for view, shape in self.shapes.items():
            features[_feature(view)] = {
                "dtype": "video",
                "shape": list(shape),
                "names": ["height", "width", "channels"],
                "info": {
                    "video.height": shape[0],
                    "video.width": shape[1],
                    "video.channels": shape[2],
                    "video.fps": int(TIMELINE_HZ),
                    "video.codec": "h264",
                    "video.pix_fmt": "yuv444p",
                    "video.is_depth_map": False,
                    "has_audio": False,
                },
            }
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        return features | {name: {"dtype": "int64", "shape": [1], "names": None} for name in INDEX_COLUMNS}


def _files(lengths: Sequence[int]) -> Iterator[range]:
    """The episodes of each file, by number."""
    begin, frames = 0, 0
    for number, length in enumerate(lengths):
        full = number - begin == EPISODES_PER_FILE or (frames + length) / TIMELINE_HZ > SECONDS_PER_FILE
        if full and number > begin:
            yield range(begin, number)
            begin, frames = number, 0
        frames += length
    yield range(begin, len(lengths))


def _tasks_table(tasks: dict[str, int]) -> Any:
    """LeRobot reads the words as pandas' index, which the schema names for pandas."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    kinds = {"task_index": ("int64", "int64"), "task": ("unicode", "object")}
    columns = [
        {"name": name, "field_name": name, "pandas_type": pandas, "numpy_type": numpy, "metadata": None}
        for name, (pandas, numpy) in kinds.items()
    ]
    pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns}
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})


def _numbers(column: Any) -> np.ndarray:
    """(N, width)."""
    values: np.ndarray = np.array(column.to_pylist())
    return values.reshape(len(values), -1)


def _parts_of(episode: Episode) -> list[tuple[str, str]]:
    """The parts of arms that an episode reports, in the order of the columns written."""
    motion = episode.motion
    if not isinstance(motion, BimanualMotion):
        raise DataError(f"{episode.name}: expected two arms")
    return [(arm, part) for arm, part in arm_parts(motion.targets) if motion.columns[getattr(ARMS[arm], part)].all()]


def _feature(view: str) -> str:
    return f"observation.images.{view}"
