"""Episode files to a LeRobot v3.0 dataset, and back."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from xr0_engine.training.data.description import DESCRIPTION_FILE
from xr0_engine.training.data.episode import ARMS, PARTS, TIMELINE_HZ, Episode, arm_parts, save_episode
from xr0_engine.training.data.lerobot import INFO_FILE, STATUS_COLUMN, LeRobotDataset
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.parallel import progress_bar
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import EpisodeFolder, Source
from xr0_engine.training.data.video import video_writer

# v3.0 keeps many episodes in a file; so many give files of some hundred megabytes at usual sizes.
EPISODES_PER_FILE = 50
CHUNK_FILES = 1000
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
FEATURE = {"proprios": "observation.state", "targets": "action"}
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")


def to_lerobot(source: Source, out: Path) -> None:
    """Write episode files as a LeRobot v3.0 dataset with its description. Videos are encoded anew, at 30 Hz.

    Raises ValueError if `out` is there, DataError for an episode that cannot be read or whose views differ in size from
    the first one's. The folder appears whole or not at all.
    """
    if not isinstance(source, EpisodeFolder):
        raise ValueError(f"{source.description.folder}: expected a folder of episode files")
    with _all_or_nothing(out) as folder, progress_bar() as progress:
        writer = _LeRobotWriter(folder, source)
        task = progress.add_task("to LeRobot", total=len(source.names))
        for begin in range(0, len(source.names), EPISODES_PER_FILE):
            numbers = range(begin, min(begin + EPISODES_PER_FILE, len(source.names)))
            writer.write_file(begin // EPISODES_PER_FILE, numbers, lambda: progress.advance(task))
        writer.write_meta()


def from_lerobot(source: Source, out: Path) -> None:
    """Write a LeRobot dataset as episode files. Video files are copied as they are, and episodes are cut out of them.

    Raises ValueError if `out` is there or the robot is not of layout `bimanual` at 30 Hz, which is all that episode
    files hold; DataError for an episode that cannot be read. The folder appears whole or not at all.
    """
    if not isinstance(source, LeRobotDataset):
        raise ValueError(f"{source.description.folder}: expected a LeRobot dataset")
    with _all_or_nothing(out) as folder, progress_bar() as progress:
        (folder / "videos").mkdir()
        copied: dict[Path, Path] = {}
        for number in progress.track(range(len(source.names)), description="from LeRobot"):
            episode = source.load(number)
            if episode.instruction_at is not None:
                raise DataError(f"{episode.name}: its task changes on the way, which episode files cannot tell")
            clips = {}
            for view, clip in episode.clips.items():
                if clip.path not in copied:
                    copied[clip.path] = folder / "videos" / "-".join(clip.path.relative_to(source.path).parts[1:])
                    shutil.copyfile(clip.path, copied[clip.path])
                clips[view] = replace(clip, path=copied[clip.path])
            path = folder / f"episode_{source.entries[number].index:06d}.json"
            save_episode(path, replace(episode, clips=clips))
        _describe(folder, source, {})


class _LeRobotWriter:
    """Files of a v3.0 dataset, one of data and one a view for some episodes at a time."""

    def __init__(self, folder: Path, source: EpisodeFolder) -> None:
        self.folder, self.source = folder, source
        first = source.load(0)
        self.parts = _parts_of(first)
        self.shapes = {view: first.image(view, 0).shape for view in first.clips}
        self.tasks: dict[str, int] = {}
        self.episodes: list[dict[str, Any]] = []
        self.frames = 0

    def write_file(self, file: int, numbers: Sequence[int], advance: Callable[[], None]) -> None:
        place = {"chunk_index": file // CHUNK_FILES, "file_index": file % CHUNK_FILES}
        tables, frames_in_file = [], 0
        with ExitStack() as stack:
            write = {view: stack.enter_context(self._video(view, place)) for view in self.shapes}
            for number in numbers:
                episode = self.source.load(number)
                tables.append(self._table(episode, number))
                for view in self.shapes:
                    for tick in range(len(episode.motion)):
                        write[view](self._frame(episode, view, tick))
                self._note(episode, number, place, frames_in_file / TIMELINE_HZ)
                frames_in_file += len(episode.motion)
                advance()
        path = self.folder / DATA_PATH.format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.concat_tables(tables), path)

    def write_meta(self) -> None:
        episodes = self.folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
        episodes.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(self.episodes), episodes)
        tasks = pa.table({"task": list(self.tasks), "task_index": pa.array(self.tasks.values(), pa.int64())})
        pq.write_table(tasks, self.folder / "meta" / "tasks.parquet")
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.source.description.robot_type,
            "total_episodes": len(self.episodes),
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK_FILES,
            "fps": int(TIMELINE_HZ),
            "splits": {"train": f"0:{len(self.episodes)}"},
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH,
            "features": self._features(),
        }
        (self.folder / INFO_FILE).write_text(json.dumps(info, indent=2), encoding="utf-8")
        _describe(self.folder, self.source, self._mapping())

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
        if _parts_of(episode) != self.parts:
            raise DataError(f"{episode.name}: reports other parts of the arms than the first episode")
        count = len(episode.motion)
        columns: dict[str, Any] = {}
        for which, feature in FEATURE.items():
            values = arm_parts(getattr(episode.motion, which))
            rows = np.concatenate([values[key] for key in self.parts], axis=1).astype(np.float32)
            columns[feature] = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        task = self.tasks.setdefault(episode.instructions[0], len(self.tasks))
        for text in episode.instructions[1:]:
            self.tasks.setdefault(text, len(self.tasks))
        frames = np.arange(count)
        columns["timestamp"] = pa.array((frames / TIMELINE_HZ).astype(np.float32))
        indices = (frames, np.full(count, number), self.frames + frames, np.full(count, task))
        for name, column in zip(INDEX_COLUMNS, indices, strict=True):
            columns[name] = pa.array(column.astype(np.int64))
        return pa.table(columns)

    def _note(self, episode: Episode, number: int, place: dict[str, int], start_s: float) -> None:
        count = len(episode.motion)
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(episode.instructions),
            "length": count,
            "dataset_from_index": self.frames,
            "dataset_to_index": self.frames + count,
            STATUS_COLUMN: episode.status,
        }
        row |= {f"data/{name}": value for name, value in place.items()}
        for view in self.shapes:
            prefix = f"videos/{_feature(view)}"
            row |= {f"{prefix}/{name}": value for name, value in place.items()}
            row |= {f"{prefix}/from_timestamp": start_s, f"{prefix}/to_timestamp": start_s + count / TIMELINE_HZ}
        self.episodes.append(row)
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
                "info": {"video.fps": int(TIMELINE_HZ), "video.codec": "h264", "video.pix_fmt": "yuv444p"},
            }
        features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
        return features | {name: {"dtype": "int64", "shape": [1], "names": None} for name in INDEX_COLUMNS}

    def _mapping(self) -> dict[str, Any]:
        arms: dict[str, dict[str, Any]] = {}
        begin = 0
        for arm, part in self.parts:
            end = begin + PARTS[part][1]
            sources = (f"{feature}[{begin}:{end}]" for feature in FEATURE.values())
            arms.setdefault(arm, {})[part] = dict(zip(("state", "action"), sources, strict=True))
            begin = end
        return {"views": {view: _feature(view) for view in self.shapes}, "arms": arms}


def _describe(folder: Path, source: Source, mapping: dict[str, Any]) -> None:
    facts = {"robot_type": source.description.robot_type, "embodiment": source.description.embodiment.name}
    text = yaml.safe_dump(facts | mapping, sort_keys=False)
    (folder / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def _parts_of(episode: Episode) -> list[tuple[str, str]]:
    """The parts of arms that an episode reports, in the order of the columns written."""
    motion = episode.motion
    if not isinstance(motion, BimanualMotion):
        raise DataError(f"{episode.name}: expected two arms")
    return [(arm, part) for arm, part in arm_parts(motion.targets) if motion.columns[getattr(ARMS[arm], part)].all()]


def _feature(view: str) -> str:
    return f"observation.images.{view}"


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    if out.exists():
        raise ValueError(f"{out} is there already: remove it or choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
