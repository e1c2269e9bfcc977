"""What a training run tells of the checkpoint that it made: recipe, data, base, and how far its validation came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import is_number, json_lines, read_yaml, reading
from xr0_engine.hub import HubId, hub_id
from xr0_engine.publish.folder import Publishable, is_run
from xr0_engine.robot.normalize import read_statistics
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.draws import longest_prefix
from xr0_engine.training.recipes import RECIPES
from xr0_engine.training.run_folder import CONFIG_FILE, EXPORTED, METRICS_FILE, RUN_STATISTICS_FILE
from xr0_engine.types import FileError

_LOCAL = {
    *("model.checkpoint", "data.robot", "data.language", "data.validation", "data.statistics", "data.embodiment"),
    *("run.closed_loop", "run.wandb"),
}
"""Settings that tell of somebody's machine, not of the training."""


@dataclass(frozen=True)
class DatasetName:
    """of: what it is for. name: an id of the hub, else a local name. weight: as it was written, empty if none was."""

    of: str
    name: str
    weight: str

    @property
    def on_hub(self) -> HubId | None:
        return hub_id(self.name)


@dataclass(frozen=True)
class Run:
    """settings: key -> value of what differs from the recipe. base: an id of the hub, else a local name. validation:
    step, l1 and baseline_l1 of the last one; empty where the checkpoint may be of another step, or there was none.
    is_its_own: whether the checkpoint lies where the run wrote it, else somebody has said that it is the run's."""

    recipe: str
    settings: Mapping[str, Any]
    base: str
    datasets: tuple[DatasetName, ...]
    validation: Mapping[str, float]
    is_its_own: bool


def read_run(folder: Path, made: Publishable) -> Run | None:
    """None where the statistics, or what the run sets of the model, are not the checkpoint's: it was not made by this
    run. Raises FileError for what is no run, or cannot be read."""
    if not is_run(folder):
        raise FileError(f"{folder} is no run's folder: expected one that `xr0 train` wrote")
    path = folder / CONFIG_FILE
    with reading(path, FileError):
        config = TrainConfig.from_json(path.read_text(encoding="utf-8"))
    head, length = made.config.head, config.data.chunk_length
    set_by_run = {
        "local_window": config.model.local_window,
        "position_offset": config.model.position_offset,
        "max_prefix": longest_prefix(config.flow, length),
        "action_length": length,
    }
    if any(getattr(head, name) != value for name, value in set_by_run.items()):
        return None
    if made.config.normalize_instruction != config.data.normalize_instruction:
        return None
    statistics = read_statistics(
        folder / RUN_STATISTICS_FILE, head.action_dim, made.config.std_epsilon, made.config.double_statistics
    )
    ours = {name: made.statistics.get(name) for name in statistics}
    for name, theirs in statistics.items():
        own = ours[name]
        if own is None or not (np.array_equal(own.mean, theirs.mean) and np.array_equal(own.std, theirs.std)):
            return None
    recipe = RECIPES.get(config.recipe)
    before = {} if recipe is None else dict(_flat(recipe()))
    settings = {key: value for key, value in _flat(config) if key not in _LOCAL and before.get(key, value) != value}
    is_its_own = made.folder.resolve() == (folder / EXPORTED).resolve()
    return Run(
        config.recipe,
        settings,
        _base(config.model.checkpoint),
        tuple(_datasets(config)),
        _validation(folder / METRICS_FILE) if is_its_own else {},
        is_its_own,
    )


def _flat(config: TrainConfig) -> Iterator[tuple[str, Any]]:
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            yield from ((f"{part.name}.{item.name}", getattr(value, item.name)) for item in fields(value))


def _base(checkpoint: str) -> str:
    found = hub_id(checkpoint)
    return Path(checkpoint).name if found is None else found.name


def _datasets(config: TrainConfig) -> Iterator[DatasetName]:
    for of in ("robot", "language", "validation"):
        for written in getattr(config.data, of):
            path, _, weight = written.rpartition("=") if "=" in written else (written, "", "")
            yield DatasetName(of, _dataset_name(path), weight)


def _dataset_name(path: str) -> str:
    """Of a YAML file that names a dataset of the hub, that one's; of another path, its last part alone."""
    if hub_id(path) is not None:
        return path
    file = Path(path)
    if file.suffix in (".yaml", ".yml") and file.is_file():
        content = read_yaml(file)
        named = content.get("dataset") if isinstance(content, dict) else None
        # Without a commit it is a folder beside the file, which may look like an id.
        if isinstance(named, str) and (found := hub_id(named)) is not None and found.is_pinned:
            return named
    return file.name


def _validation(path: Path) -> dict[str, float]:
    wanted = {"step": "step", "l1": "validation/l1", "baseline_l1": "validation/baseline_l1"}
    found: dict[str, float] = {}
    for _, line in json_lines(path, FileError) if path.is_file() else ():
        told = {name: line.get(key) for name, key in wanted.items()}
        if all(map(is_number, told.values())):
            found = {name: float(value) for name, value in told.items() if value is not None}
    return found
