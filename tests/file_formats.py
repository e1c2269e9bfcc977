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
import torch

from tests.file_formats_of_data import (
    PICTURES,
    open_dataset,
    read_dataset,
    read_videos,
    write_lerobot,
    write_lerobot_v3,
    write_one_episode,
    write_pictures,
    write_videos,
)
from tests.guard.files import read_guard_files, write_guard_files
from tests.support import GOLDEN
from xr0_engine.bench import results
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli.infer import read_numbers
from xr0_engine.comparison import Comparison
from xr0_engine.drive.picture import plot_recording
from xr0_engine.engine import Engine
from xr0_engine.evaluation.calvin import Calvin, _chains
from xr0_engine.evaluation.compare import compare_results
from xr0_engine.evaluation.page import page
from xr0_engine.evaluation.results import Writer, read_results
from xr0_engine.evaluation.tables import summary
from xr0_engine.exchange.pickled import read_weights
from xr0_engine.exchange.recipe import read_action_config
from xr0_engine.executor import read_recording
from xr0_engine.exported.manifest import EngineManifest, ExportCase, FileRecord, Manifest, StaticShapes
from xr0_engine.files import json_lines
from xr0_engine.fused.ops import Tactic
from xr0_engine.fused.tactics import TacticTable, read_tactics, write_tactics
from xr0_engine.fused.verdict import Verdict, _as_json, _read, identity_of
from xr0_engine.golden.verify import verify_folder
from xr0_engine.model.weights import resolve_checkpoint
from xr0_engine.robot.embodiment import load_embodiment
from xr0_engine.robot.images import read_picture
from xr0_engine.robot.normalize import read_statistics
from xr0_engine.training.base import read_base
from xr0_engine.training.data.episode import load_episode
from xr0_engine.training.data.language import LanguageLines
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


def _evaluation(folder: Path) -> None:
    from tests.evaluation.fake import a_run, an_episode

    with Writer(folder, a_run()) as writer:
        for trial in range(3):
            solved = {"success": False, "solved": 0, "error": "it fell"} if trial == 1 else {}
            writer.add(an_episode(trial=trial, **solved))


def _tell_results(folder: Path) -> None:
    found = read_results(folder)
    json.dumps(summary(found))
    page(found)
    compare_results(found, found)


def _weights(folder: Path) -> None:
    tensors = {f"module.layer.{number}.weight": torch.ones(4, 8, dtype=torch.bfloat16) for number in range(3)}
    torch.save({"module": tensors, "global_steps": 3, "ds_version": "0"}, folder / "mp_rank_00_model_states.pt")


def _verdict(folder: Path) -> None:
    good = Comparison("case", "flow", 0.1, 0.2, "relative")
    identity = identity_of(torch.device("cpu"), "float32", TacticTable(""))
    told = _as_json(Verdict("passed", identity, comparisons=(good,)))
    _write("v.json", {"schema": 1, **told})(folder)


def _told(folder: Path) -> None:
    found = _read(folder / "v.json")
    # A damaged one is made again; what is taken can be told.
    if found is None:
        raise FileError("no verdict")
    assert found.told()
    assert found.subject
    sorted([found.created, ""])


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


SUBTASKS = ["open_drawer", "close_drawer", "turn_on_led", "lift_red", "place_red"]
SEQUENCES = [[{"led": 0, "slider": "left"}, SUBTASKS], [{"led": 1, "slider": "right"}, SUBTASKS[::-1]]]
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
        "episode": Format(write_one_episode, lambda f: load_episode(f / "e.json"), ("e.json",), 3),
        "LeRobot": Format(
            write_lerobot,
            open_dataset,
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
            lambda f: [read_numbers("--state", str(f / name)) for name in ("n.json", "n.npy")],
            ("n.json", "n.npy"),
        ),
    }
    found |= {
        "LeRobot v3.0": Format(
            write_lerobot_v3,
            read_dataset,
            (
                "meta/info.json",
                *("meta/episodes/chunk-000/file-000.parquet",) * 3,
                "meta/tasks.parquet",
                *("data/chunk-000/file-000.parquet",) * 3,
                "xr0.yaml",
            ),
            4,
        ),
        "video": Format(write_videos, read_videos, ("v.mp4", "w.mp4"), 2),
        "picture": Format(write_pictures, lambda f: [read_picture(f / name) for name in PICTURES], PICTURES, 4),
        "evaluation": Format(_evaluation, _tell_results, ("run.json", "episodes.jsonl", "episodes.jsonl"), 3),
        "CALVIN's chains": Format(
            _write("c.json", SEQUENCES),
            lambda f: _chains(Calvin(sequences=str(f / "c.json"), chains=2), {name: ["Do it."] for name in SUBTASKS}),
            ("c.json",),
        ),
        "released weights": Format(
            _weights,
            lambda f: [tensor.shape for tensor in read_weights(f).tensors.values()],
            ("mp_rank_00_model_states.pt",),
            2,
        ),
        "kept verdict": Format(_verdict, _told, ("v.json",)),
        "guard": Format(write_guard_files, read_guard_files, ("guard.json", "run.jsonl"), 2),
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
