"""What is in an export folder: written by `xr0 export`, read and checked by everything that runs it.

manifest.json                       Manifest: case, shapes, precision, checkpoint hash, hash and size of every file
config.json, preprocessor_config.json, tokenizer.json      the checkpoint's own
vision.onnx, prefill.224.onnx, ...  one graph per stage and prompt length
weights.data                        the weights of all graphs
rtx4090/manifest.json               EngineManifest of the engines built for one target
rtx4090/vision.engine, vision.layers.json, ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch

from xr0_engine.files import GUARD_FILE, pointer_fault, read_json, reading, section, text, whole
from xr0_engine.part_configs import STEPS
from xr0_engine.robot.history import MOST_FRAMES
from xr0_engine.types import FileError

MANIFEST_FILE = "manifest.json"
SCHEMA = 1
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
READ_BYTES = 2**24
LARGEST_BATCH = 1 << 12
LARGEST_SIDE = 1 << 16
"""Pixels and patches of an image, and tokens of a prompt."""

Self = TypeVar("Self", bound="_Json")


@dataclass(frozen=True)
class ExportCase:
    """One situation of a robot, to which an export's shapes belong.

    profile: embodiment profile for other views than the robot type's own. image_size: (height, width) of every camera.
    """

    name: str
    robot_type: str
    image_size: tuple[int, int]
    batch: int = 1
    profile: str | None = None


@dataclass(frozen=True)
class StaticShapes:
    """What the graphs are fixed to.

    grids: (height, width) in patches of every image of the batch. chunk_length: T. tokens: the prompt lengths that
    there are graphs for, ascending; a prompt is padded on the left to the first that holds it. frames: of every view,
    1 where it is a picture; a video has a grid for each of its temporal patches.
    """

    grids: tuple[tuple[int, int], ...]
    batch: int
    chunk_length: int
    tokens: tuple[int, ...]
    frames: int = 1

    def bucket(self, tokens: int) -> int:
        """Raises ValueError for a prompt longer than any."""
        for size in self.tokens:
            if tokens <= size:
                return size
        raise ValueError(
            f"instruction: the prompt has {tokens} tokens, the export was made for at most {self.tokens[-1]}; "
            "shorten it, or export again with a larger --tokens"
        )


@dataclass(frozen=True)
class FileRecord:
    """sha256: hexadecimal."""

    bytes: int
    sha256: str


class _Json:
    """A dataclass that is a JSON file of one format; read strictly."""

    FORMAT: str

    @classmethod
    def read(cls: type[Self], folder: Path) -> Self:
        """Raises FileError, a ValueError, if the manifest is missing, foreign or corrupt."""
        path = folder / MANIFEST_FILE
        if not path.is_file():
            raise FileError(f"{folder} holds no {MANIFEST_FILE}: not a folder that `xr0 export` wrote")
        content = read_json(path, FileError)
        if not isinstance(content, dict) or content.pop("format", None) != cls.FORMAT:
            raise FileError(f"{path} is foreign: its format is not {cls.FORMAT!r}")
        schema = content.pop("schema", None)
        if schema != SCHEMA:
            raise FileError(f"{path} has schema {schema!r:.80}; this version reads {SCHEMA}")
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if content.keys() != names:
            raise FileError(
                f"{path} is corrupt: missing {sorted(names - content.keys())}, unknown "
                f"{sorted(content.keys() - names)!r:.200}"
            )
        with reading(path, FileError, "; it is corrupt: export again"):
            return cls._from_json(content)

    def write(self, folder: Path) -> None:
        content = {"format": self.FORMAT, "schema": SCHEMA, **asdict(self)}  # type: ignore[call-overload]
        (folder / MANIFEST_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def located(self, folder: Path) -> dict[Path, FileRecord]:
        """The files that it lists, where they are."""
        return {folder / name: record for name, record in self.files.items()}

    @classmethod
    def _from_json(cls: type[Self], content: dict[str, Any]) -> Self:
        raise NotImplementedError

    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Manifest(_Json):
    """An export of ONNX graphs.

    precision: of PRECISIONS. checkpoint: where it was, as given; checkpoint_sha256: checkpoint_hash of it.
    robot_types: those whose chunks and views the shapes are for. stages: stage_key -> graph.
    """

    FORMAT = "xr0-export-onnx"

    precision: str
    opset: int
    case: ExportCase
    shapes: StaticShapes
    robot_types: tuple[str, ...]
    checkpoint: str
    checkpoint_sha256: str
    stages: Mapping[str, str]
    files: Mapping[str, FileRecord]

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Manifest:
        case, shapes = section(content, "case"), section(content, "shapes")
        if text(content, "precision") not in PRECISIONS:
            raise ValueError(f"precision {content['precision']!r:.80}")
        return cls(
            precision=text(content, "precision"),
            opset=whole(content, "opset", least=1, most=1000),
            case=ExportCase(
                name=text(case, "name"),
                robot_type=text(case, "robot_type"),
                image_size=_pair("image_size", case["image_size"]),
                batch=whole(case, "batch", 1, 1, LARGEST_BATCH),
                profile=None if case.get("profile") is None else text(case, "profile"),
            ),
            shapes=StaticShapes(
                grids=tuple(_pair("grids", grid) for grid in _list(shapes, "grids")),
                batch=whole(shapes, "batch", least=1, most=LARGEST_BATCH),
                chunk_length=whole(shapes, "chunk_length", least=1, most=STEPS[1]),
                tokens=tuple(
                    whole({"tokens": size}, "tokens", None, 1, LARGEST_SIDE) for size in _list(shapes, "tokens")
                ),
                frames=whole(shapes, "frames", 1, 1, MOST_FRAMES),
            ),
            robot_types=tuple(text({"robot_types": name}, "robot_types") for name in _list(content, "robot_types")),
            checkpoint=text(content, "checkpoint"),
            checkpoint_sha256=text(content, "checkpoint_sha256"),
            stages=_stages(content),
            files=_files(content),
        )


@dataclass(frozen=True)
class EngineManifest(_Json):
    """Engines for one target, in a folder of an export.

    builder: tensorrt_rtx or tensorrt, with its version. export_sha256: of the export's manifest. facts: per stage, what
    building took and gave.
    """

    FORMAT = "xr0-export-engines"

    builder: str
    builder_version: str
    target: str
    compute_capability: str
    export_sha256: str
    stages: Mapping[str, str]
    facts: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, FileRecord]

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> EngineManifest:
        words = ("builder", "builder_version", "target", "compute_capability", "export_sha256")
        facts = section(content, "facts")
        return cls(
            **{name: text(content, name) for name in words},
            facts={stage: section(facts, stage) for stage in facts},
            stages=_stages(content),
            files=_files(content),
        )


def stage_key(stage: str, tokens: int) -> str:
    """A stage's name in manifests; all but vision depend on the prompt's length."""
    return stage if stage == "vision" else f"{stage}.{tokens}"


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    return {name: FileRecord((folder / name).stat().st_size, sha256(folder / name)) for name in sorted(names)}


def check_sizes(files: Mapping[Path, FileRecord]) -> None:
    """Raises ValueError that names every file that is missing, not fetched by git-lfs, or has another size."""
    faults = []
    for path, record in files.items():
        if not path.is_file():
            faults.append(f"{path} is missing")
        elif pointer := pointer_fault(path):
            faults.append(pointer)
        elif path.stat().st_size != record.bytes:
            faults.append(f"{path} has {path.stat().st_size} bytes, not {record.bytes}")
    if faults:
        raise ValueError("the export is damaged: " + "; ".join(faults))


def changed_files(files: Mapping[Path, FileRecord]) -> list[str]:
    """Names of those that are missing or have other content than was written; reads every file."""
    return [path.name for path, record in files.items() if not path.is_file() or sha256(path) != record.sha256]


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def checkpoint_hash(folder: Path) -> str:
    """One hash of all that decides a checkpoint's actions: configuration, statistics, tokenizer, weights. A guard's
    thresholds decide none."""
    digest = hashlib.sha256()
    names = [
        path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors") and path.name != GUARD_FILE
    ]
    for name in sorted(names):
        digest.update(f"{name} {sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _pair(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise TypeError(f"{name} is {value!r:.80}, not two whole numbers")
    height, width = (whole({name: side}, name, None, 1, LARGEST_SIDE) for side in value)
    return height, width


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    """Of at least one."""
    value = values[name]
    if not isinstance(value, list) or not value:
        raise TypeError(f"{name} is {value!r:.80}, not a list of at least one")
    return value


def _stages(content: Mapping[str, Any]) -> dict[str, str]:
    named = section(content, "stages")
    stages = {key: text(named, key) for key in named}
    strange = [name for name in stages.values() if name not in content["files"]]
    if strange:
        raise ValueError(f"stages name files that are not listed: {strange}")
    return stages


def _files(content: Mapping[str, Any]) -> dict[str, FileRecord]:
    listed = section(content, "files")
    raws = {name: section(listed, name) for name in listed}
    records = {name: FileRecord(whole(raw, "bytes", least=0), text(raw, "sha256")) for name, raw in raws.items()}
    outside = [name for name in records if Path(name).name != name]
    if outside:
        raise ValueError(f"files outside of the folder: {outside}")
    return records
