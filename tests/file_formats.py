"""Every format of files that is read: valid files to begin with, and what reads them. For tests/fuzz_files.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import GOLDEN
from xr0_engine.bench import results
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli.infer import _read_numbers
from xr0_engine.drive.picture import plot_recording
from xr0_engine.engine import Engine
from xr0_engine.exchange.recipe import read_action_config
from xr0_engine.executor import read_recording
from xr0_engine.exported.manifest import EngineManifest, ExportCase, FileRecord, Manifest, StaticShapes
from xr0_engine.files import json_lines
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.tactics import TacticTable, read_tactics, write_tactics
from xr0_engine.golden import verify_folder
from xr0_engine.model.weights import resolve_checkpoint
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.normalize import read_statistics
from xr0_engine.training.base import read_base
from xr0_engine.training.data.description import describe
from xr0_engine.training.data.episode import load_episode
from xr0_engine.training.data.language import LanguageLines
from xr0_engine.training.data.lerobot import LeRobotDataset
from xr0_engine.training.recipes import finetune_head
from xr0_engine.training.start import _read_config
from xr0_engine.training.validation import plot_run
from xr0_engine.types import FileError


@dataclass(frozen=True)
class Format:
    """make: writes valid files into a folder that exists; read: reads them all, and returns actions if there are any.

    files: those among them that are damaged; weight: how often, beside the others.
    """

    make: Callable[[Path], object]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    weight: int = 1


def _checkpoint(folder: Path) -> None:
    init_checkpoint(folder)
    # A profile of its own, which config.json may have too.
    path = folder / "config.json"
    config = json.loads(path.read_text())
    profile = asdict(load_embodiment("libero"))
    path.write_text(json.dumps({**config, "embodiment": profile, "local_window": 4, "position_offset": 10}))


def _infer(folder: Path) -> np.ndarray:
    engine = Engine.from_pretrained(folder, "cpu", "float32", "reference")
    actions = engine.infer(engine.example("libero_all", (48, 64)), seed=0).actions
    assert isinstance(actions, np.ndarray)
    return actions


def _write(name: str, content: Any) -> Callable[[Path], object]:
    text = content if isinstance(content, str) else json.dumps(content)
    return lambda folder: (folder / name).write_text(text)


def _recording(folder: Path) -> None:
    command = [sys.executable, "-m", "xr0_engine", "drive", "--env", "null", "--delay-steps", "2", "--seconds", "1"]
    subprocess.run([*command, "--record", str(folder / "s.jsonl")], check=True, capture_output=True)


def _replay(folder: Path) -> None:
    plot_recording(read_recording(folder / "s.jsonl"), folder / "out.png")


def _episode(folder: Path) -> None:
    from tests.training.data.fixtures import write_episode

    write_episode(folder, 0, 6).rename(folder / "e.json")


def _lerobot(folder: Path) -> None:
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


def _open_dataset(folder: Path) -> None:
    dataset = LeRobotDataset(describe(folder))
    assert len(dataset.names) == len(dataset.lengths) == len(dataset.statuses)
    if dataset.entries:
        dataset.load(0)


def _manifests(folder: Path) -> None:
    files = {"vision.onnx": FileRecord(10, "0" * 64), "prefill.224.onnx": FileRecord(12, "1" * 64)}
    stages = {"vision": "vision.onnx", "prefill.224": "prefill.224.onnx"}
    case, shapes = ExportCase("c", "libero_all", (48, 64)), StaticShapes(((4, 4),), 1, 10, (224,))
    Manifest("fp32", 17, case, shapes, ("libero_all",), "x", "2" * 64, stages, files).write(folder)
    (folder / "t").mkdir()
    EngineManifest("tensorrt", "10", "rtx4090", "8.9", "3" * 64, stages, {"vision": {"s": 1}}, files).write(
        folder / "t"
    )


def _read_manifests(folder: Path) -> None:
    Manifest.read(folder)
    EngineManifest.read(folder / "t")


def _tactics(folder: Path) -> None:
    tactic, times = Tactic(schedule="stream"), {"linear 1x2": {"tiled": 3.0, "library": 4.5}}
    write_tactics(TacticTable("nvidia-x", {"linear 1x2": tactic}, 3, times, {"torch": "2"}), folder / "t.json")


def _result(folder: Path) -> None:
    series = {"reference": {"vision": [1.0, 2.0], "total": [3.0, 4.0]}}
    results.write(
        results.Result("latency", "xr0", {"device": "cpu"}, {"batch": 1}, "all", "reference", series), folder / "r.json"
    )


def _golden(folder: Path) -> None:
    for name in ("grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"):
        shutil.copyfile(GOLDEN / name, folder / name)


def _metrics(folder: Path) -> None:
    lines = [{"step": step, "loss": 1.0 / (step + 1), "rows_per_s": 2.0} for step in range(5)]
    l1 = {"l1": 0.5, "baseline_l1": 1.0, "ratio": 2.0, "l1_by_step": [0.5, 0.6], "baseline_by_step": [1.0, 1.1]}
    lines.append({"step": 5, **{f"validation/{name}": value for name, value in l1.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _plot_metrics(folder: Path) -> None:
    list(json_lines(folder / "metrics.jsonl", FileError))
    plot_run(folder, folder / "out.png")


def _tables() -> dict[str, Any]:
    return {"action_config": {"arm": {"mean": [[0.0] * 32] * 3, "std": [[1.0] * 32] * 3, "active_columns": [0, 1]}}}


LANGUAGE = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cup."}]}
RECIPE = (
    "data:\n  params:\n    train_datasets:\n      mean:\n"
    + "      - [0.0, 1.0]\n" * 3
    + "      std:\n"
    + "      - [1.0, 1e-06]\n" * 3
)
SCRIPT = "data = dict(params=dict(train_datasets=dict(mean=[[0.0, 1.0]], std=[[1.0, 1e-6]])))\nx = [1] * 9\n"
CHECKPOINT_FILES = (
    *("config.json",) * 6,
    *("preprocessor_config.json",) * 3,
    *("tokenizer.json",) * 2,
    "model.safetensors.index.json",
    *("model-00001-of-00001.safetensors",) * 3,
)


def formats() -> dict[str, Format]:
    """Name -> format."""
    found = {
        "checkpoint": Format(_checkpoint, _infer, CHECKPOINT_FILES, 24),
        "base of a training": Format(_checkpoint, lambda f: read_base(resolve_checkpoint(f)), CHECKPOINT_FILES, 1),
        "profile (YAML)": Format(
            lambda f: shutil.copyfile(_profile("libero"), f / "p.yaml"),
            lambda f: load_embodiment(f / "p.yaml"),
            ("p.yaml",),
            4,
        ),
        "recording": Format(_recording, _replay, ("s.jsonl",), 2),
        "episode": Format(_episode, lambda f: load_episode(f / "e.json"), ("e.json",), 3),
        "LeRobot": Format(
            _lerobot,
            _open_dataset,
            ("meta/info.json", "meta/info.json", "meta/episodes.jsonl", "meta/tasks.jsonl", "xr0.yaml"),
            4,
        ),
        "export manifests": Format(_manifests, _read_manifests, ("manifest.json", "t/manifest.json"), 3),
        "tactics": Format(_tactics, lambda f: read_tactics(f / "t.json"), ("t.json",), 2),
        "benchmark result": Format(_result, lambda f: results.read(f / "r.json"), ("r.json",), 2),
        "training config": Format(_write("config.json", finetune_head().to_json()), _read_config, ("config.json",), 3),
        "training metrics": Format(_metrics, _plot_metrics, ("metrics.jsonl",), 1),
        "statistics": Format(
            _write("s.json", _tables()), lambda f: read_statistics(f / "s.json", 32, 0.0), ("s.json",), 2
        ),
        "language data": Format(
            _write("l.jsonl", json.dumps(LANGUAGE) + "\n"),
            lambda f: LanguageLines(f / "l.jsonl").sample(0),
            ("l.jsonl",),
        ),
        "released recipe": Format(
            lambda f: (_write("c.yaml", RECIPE)(f), _write("c.py", SCRIPT)(f)),
            lambda f: [read_action_config(f / name, "arm") for name in ("c.yaml", "c.py")],
            ("c.yaml", "c.py"),
            2,
        ),
        "numbers of xr0 infer": Format(
            lambda f: (_write("n.json", [[0.5] * 8] * 2)(f), np.save(f / "n.npy", np.zeros((2, 8)))),
            lambda f: [_read_numbers("--state", str(f / name)) for name in ("n.json", "n.npy")],
            ("n.json", "n.npy"),
        ),
    }
    if GOLDEN.is_dir():
        read = lambda f: list(verify_folder(f, "reference", "cpu", "float32"))  # noqa: E731
        found["golden cases"] = Format(
            _golden,
            read,
            ("grouped.json", "grouped.json", "grouped.weights.safetensors", "grouped.prefix1.safetensors"),
            1,
        )
    return found


def _profile(name: str) -> Path:
    import xr0_engine.robot

    return Path(xr0_engine.robot.__file__).parent / "embodiments" / f"{name}.yaml"
