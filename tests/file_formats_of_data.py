"""Datasets, their videos and pictures: valid ones to begin with, and what reads them. For tests/file_formats.py."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from xr0_engine.training.data.convert import to_lerobot
from xr0_engine.training.data.description import describe
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import open_source
from xr0_engine.training.data.video import Clip, probe


def write_one_episode(folder: Path) -> None:
    from tests.training.data.fixtures import write_episode

    write_episode(folder, 0, 6).rename(folder / "e.json")


def write_lerobot(folder: Path) -> None:
    """v2.1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tests.training.data.fixtures import write_video

    feature = {"dtype": "float32", "shape": [8], "names": [f"joint_{column}" for column in range(8)]}
    info = {
        "codebase_version": "v2.1",
        "fps": 20,
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.state": feature,
            "action": feature,
            "front": {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]},
            "wrist": {"dtype": "video", "shape": [48, 64, 3], "names": ["height", "width", "channel"]},
        },
    }
    (folder / "meta").mkdir()
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "episodes.jsonl").write_text('{"episode_index": 0, "tasks": ["go"], "length": 6}\n')
    (folder / "meta" / "tasks.jsonl").write_text('{"task_index": 0, "task": "go"}\n')
    data = folder / "data" / "chunk-000"
    data.mkdir(parents=True)
    rows = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    columns = {
        "observation.state": list(rows),
        "action": list(rows),
        "timestamp": np.arange(6, dtype=np.float32) / 20,
        "frame_index": np.arange(6),
        "episode_index": np.zeros(6, np.int64),
        "index": np.arange(6),
        "task_index": np.zeros(6, np.int64),
    }
    pq.write_table(pa.table(columns), data / "episode_000000.parquet")
    for view in ("front", "wrist"):
        write_video(folder / "videos" / "chunk-000" / view / "episode_000000.mp4", range(6), fps=20)
    (folder / "xr0.yaml").write_text(
        "robot_type: libero_all\npictures: camera\nviews: {base: front, left_wrist: wrist}\n"
        'state:\n  - {columns: "0:8", from: observation.state}\n'
        'action:\n  - {columns: "0:6", from: "action[0:6]", kind: step}\n'
        '  - {columns: "6", from: "action[joint_6]"}\n'
    )


def open_dataset(folder: Path) -> None:
    dataset = LeRobotDataset(describe(folder))
    assert len(dataset.names) == len(dataset.lengths) == len(dataset.statuses)
    if dataset.entries:
        dataset.load(0)


def write_lerobot_v3(folder: Path) -> None:
    from tests.training.data.fixtures import write_episode

    with tempfile.TemporaryDirectory() as kept:
        for number, status in enumerate(("success", "invalid")):
            write_episode(Path(kept), number, 6, status, ("Fold the towel.", "Fold it."))
        to_lerobot(open_source(Path(kept)), folder / "new")
    for path in (folder / "new").iterdir():
        path.rename(folder / path.name)
    (folder / "new").rmdir()


def read_dataset(folder: Path) -> None:
    dataset = LeRobotDataset(describe(folder))
    for number in range(len(dataset.entries)):
        episode = dataset.load(number)
        for clip in episode.clips.values():
            clip.read(0)


def write_videos(folder: Path) -> None:
    from tests.training.data.fixtures import encode_video, write_video

    write_video(folder / "v.mp4", range(8))
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8)
    encode_video(folder / "w.mp4", noise, options={"bf": "2"})


def read_videos(folder: Path) -> None:
    faults = []
    for name in ("v.mp4", "w.mp4"):
        try:
            probe(folder / name)
            for frame in (7, 0):
                Clip(folder / name, 0.0, 8, 30.0).read(frame)
        except DataError as fault:
            faults.append(fault)
    if faults:
        raise faults[0]


PICTURES = ("a.jpg", "a.png", "a.webp", "a.tiff")


def write_pictures(folder: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in PICTURES:
        image.save(folder / name, exif=exif, **({"progressive": True} if name == "a.jpg" else {}))
