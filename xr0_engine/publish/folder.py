"""A checkpoint's folder, read for publishing: checked as the engine checks it, and nothing in it that is none of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from xr0_engine.config import ModelConfig
from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.files import GUARD_FILE, find_settings, number, read_json, reading, section, whole
from xr0_engine.model.quantization import QUANTIZATION_FILE, Quantization, read_quantization
from xr0_engine.model.weights import INDEX_FILE, StoredTensor, check_stored, read_index
from xr0_engine.robot.limits import VIDEO_FILE
from xr0_engine.robot.normalize import ActionStatistics
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.training.run_folder import CONFIG_FILE, EXPORTED
from xr0_engine.types import CheckpointError

CARD_FILE = "README.md"
FIDELITY_FILES = ("fidelity.json", "fidelity.html")
PARTS = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", VIDEO_FILE),
    *("tokenizer*.json", "special_tokens*.json", "added_tokens*.json", "vocab*.json", "merges.txt", "chat_template.*"),
    *(INDEX_FILE, QUANTIZATION_FILE, GUARD_FILE, *FIDELITY_FILES, CARD_FILE, "LICENSE*", "NOTICE*"),
)
"""Names of a checkpoint's files besides its weights."""


@dataclass(frozen=True)
class Publishable:
    """A checked checkpoint. files: name -> path, what is pushed. sha256: checkpoint_hash. own_card: whether README.md
    is among the files."""

    folder: Path
    config: ModelConfig
    statistics: Mapping[str, ActionStatistics]
    stored: Mapping[str, StoredTensor]
    quantization: Quantization | None
    files: Mapping[str, Path]
    sha256: str

    @property
    def own_card(self) -> bool:
        return CARD_FILE in self.files

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def read_publishable(folder: Path) -> Publishable:
    """Raises CheckpointError for a folder that the engine would not load, and ValueError for a run's, and for one that
    holds what is no part of a checkpoint; hidden files are passed over."""
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}")
    if is_run(folder):
        exported = folder / EXPORTED
        remedy = f"push {exported}" if exported.is_dir() else f"`xr0 train export {folder} --out DIR`, and push DIR"
        raise ValueError(f"{folder} is a run, with its optimiser and logs, not a checkpoint: {remedy}")
    preprocess = Preprocessor.load(folder)
    quantization = read_quantization(folder)
    stored = read_index(folder, quantized=quantization is not None)
    layers = {} if quantization is None else quantization.layers
    check_stored(preprocess.config, stored, layers, quantization is not None)
    weights = {place.file.name for place in stored.values()}
    files, strange = {}, []
    for path in sorted(folder.iterdir()):
        is_part = path.name in weights or any(fnmatch(path.name, part) for part in PARTS)
        if path.name.startswith("."):
            continue
        if path.is_file() and is_part:
            files[path.name] = path
        else:
            strange.append(path.name)
    if strange:
        raise ValueError(
            f"{folder} holds what is no part of a checkpoint: {', '.join(strange[:8])}"
            f"{f' and {len(strange) - 8} more' if len(strange) > 8 else ''}: move it elsewhere, nothing was pushed"
        )
    return Publishable(
        folder, preprocess.config, preprocess.statistics, stored, quantization, files, checkpoint_hash(folder)
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run's, whose config.json is no model's."""
    path = folder / CONFIG_FILE
    content = read_json(path) if path.is_file() else None
    return isinstance(content, dict) and "recipe" in content


def image_settings(folder: Path) -> Mapping[str, object]:
    """What a checkpoint says of its images."""
    return next(iter(find_settings(folder).values()), {})


def fidelity(folder: Path) -> tuple[int, float, float] | None:
    """What `xr0 quantize` found when it compared: on how many moments, cosine of the chunks in the mean and at worst;
    None without. Raises CheckpointError."""
    path = folder / FIDELITY_FILES[0]
    if not path.is_file():
        return None
    content = read_json(path)
    with reading(path):
        cosine = section(section({"content": content}, "content"), "cosine")
        return whole(content, "moments"), number(cosine, "mean"), number(cosine, "worst")
