"""Runs as folders: start, resume, export. What `xr0 train` calls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from xr0_engine.exported.manifest import checkpoint_hash
from xr0_engine.files import read_bytes, read_json, reading, text
from xr0_engine.hub import hub_id
from xr0_engine.robot.embodiment import builtin_embodiments
from xr0_engine.robot.normalize import ActionStatistics, check_states, read_statistics
from xr0_engine.training.base import Base, read_base
from xr0_engine.training.checkpoint import Export, checkpoints
from xr0_engine.training.closed_loop import find_closed_loop
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.data.hub import find_on_hub, pinned
from xr0_engine.training.data.stream import Mixture, Stream, validation_samples
from xr0_engine.training.distributed import world
from xr0_engine.training.memory import GIB, ON_A_GPU, forecast_run, report, room_of
from xr0_engine.training.model import model_config
from xr0_engine.training.named import is_function
from xr0_engine.training.profiles import check_profiles, check_robot_types, run_profile
from xr0_engine.training.run_folder import BASE_FILE, CHECKPOINTS, CONFIG_FILE, RUN_STATISTICS_FILE
from xr0_engine.training.tracking import check_tracking
from xr0_engine.training.trainer import Trainer
from xr0_engine.types import CheckpointError, FileError
from xr0_engine.whole import LOCK_FILE, PARTIAL, is_fresh, only_writer, write_whole

PATHS = ("robot", "language", "validation")
ROOM = "that there are for it"
LEFT = f".*-????????{PARTIAL}.*"
"""What whole_file leaves if it is killed."""


def start_run(config: TrainConfig, folder: Path) -> None:
    """Train a new run in a folder that is absent or empty, to its end.

    Raises ValueError and CheckpointError for what is missing or wrong, before anything is written; for what the
    datasets' descriptions tell, before anything is loaded.
    """
    needed = {
        "model.checkpoint": config.model.checkpoint,
        "data.robot": config.data.robot,
        "data.statistics": config.data.statistics,
    }
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise ValueError(f"config: expected {' and '.join(missing)}, as KEY=VALUE")
    _refuse_used(folder)
    check_tracking(config)
    if config.run.closed_loop:
        find_closed_loop(config.run.closed_loop)
    # A run is resumed from any folder, so its paths are absolute; and at any time, so the hub's have their commit.
    paths: dict[str, Any] = {name: tuple(map(_absolute, getattr(config.data, name))) for name in PATHS}
    if config.data.embodiment and config.data.embodiment not in builtin_embodiments():
        paths["embodiment"] = str(Path(config.data.embodiment).resolve())
    config = replace(config, data=replace(config.data, **paths))
    views = check_profiles(config.data)
    base = read_base(config.model.checkpoint)
    statistics = _statistics(Path(config.data.statistics), base, config)
    if base.name != config.model.checkpoint and hub_id(base.name) and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"model.checkpoint: {config.model.checkpoint}: of several processes all must read the same commit: write "
            f"{base.name}"
        )
    config = replace(config, model=replace(config.model, checkpoint=base.name))
    with _writing(folder):
        # Somebody else may have started there meanwhile.
        _refuse_used(folder)
        _train(config, folder, statistics, views, base)


def forecast_settings(config: TrainConfig, gib: float | None) -> str:
    """What start_run would say of the memory, of a config that names checkpoint and statistics.

    gib: of the GPU that the run is for; None: of this machine's, if it has one. Raises ValueError and CheckpointError.
    """
    base = read_base(config.model.checkpoint)
    statistics = _statistics(Path(config.data.statistics), base, config)
    if gib is not None:
        room = max(0, int(gib * GIB) - ON_A_GPU)
    elif torch.cuda.is_available():
        room = room_of(torch.device("cuda", 0))
    else:
        room = None
    return report(config, lambda changed: forecast_run(changed, base, statistics), room, ROOM)


def resume_run(folder: Path) -> None:
    """Go on with a run after its last checkpoint. Raises ValueError if the folder holds no run, or one that goes on."""
    config = _read_config(folder)
    check_tracking(config)
    views = check_profiles(config.data)
    base = read_base(config.model.checkpoint)
    with _writing(folder):
        if _is_first():
            _check_base(folder, base)
        statistics = _statistics(folder / RUN_STATISTICS_FILE, base, config)
        _train(config, folder, statistics, views, base)


def export_run(folder: Path, out: Path, step: int | None, adapter: bool = False, average: bool = False) -> str:
    """Write the checkpoint of a step (None: the last) as a folder that the engine loads.

    adapter: what the run has trained alone, to be loaded over its base. average: the moving average of the weights.
    Returns the base's name. Raises ValueError, CheckpointError for a base that has changed since the run began.
    """
    config = _read_config(folder)
    saved = {int(path.name.rpartition("-")[2]): path for path in checkpoints(folder / CHECKPOINTS)}
    if not saved:
        raise ValueError(f"{folder} has no checkpoint yet")
    if step is not None and step not in saved:
        raise ValueError(f"--step: expected one of {', '.join(map(str, saved))}, got {step}")
    base = read_base(config.model.checkpoint)
    _check_base(folder, base)
    chosen = saved[max(saved) if step is None else step]
    statistics = _statistics(folder / RUN_STATISTICS_FILE, base, config)
    xr0, profile = model_config(base.config, config), run_profile(config.data)
    export = Export(xr0, base, statistics, config.run.seed, profile, config.lora)
    (export.adapter_of_checkpoint if adapter else export.of_checkpoint)(chosen, out, average)
    return base.name


def _refuse_used(folder: Path) -> None:
    if _is_first() and not is_fresh(folder) and not _has_only_begun(folder):
        raise ValueError(f"{folder} exists and is not empty: xr0 train resume {folder}, or choose another folder")


def _has_only_begun(folder: Path) -> bool:
    """Whether a run was killed before it had written its config: its lock is still there, with nothing but these."""
    own = {LOCK_FILE, RUN_STATISTICS_FILE, BASE_FILE}
    names = {path.name for path in folder.iterdir() if not path.match(LEFT)} if folder.is_dir() else set()
    return LOCK_FILE in names and names <= own


def _writing(folder: Path) -> AbstractContextManager[None]:
    """The first of a run's processes holds the folder's lock for all of them."""
    return _only_writer(folder) if _is_first() else nullcontext()


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    with only_writer(folder):
        # Nobody else writes here: what is half written is of a process that was killed.
        for left in folder.glob(LEFT):
            left.unlink()
        yield


def _is_first() -> bool:
    # The processes of one run start at different times: the first may have written before another looks.
    return os.environ.get("RANK", "0") == "0"


def _train(
    config: TrainConfig,
    folder: Path,
    statistics: Mapping[str, ActionStatistics],
    views: Sequence[str],
    base: Base,
) -> None:
    """views: what each dataset is seen through, told once."""
    data = config.data
    check_robot_types(data, statistics)
    fraction = 0.0 if data.validation else data.validation_fraction
    mixture = Mixture(
        data.robot,
        data.language,
        data.language_every,
        data.validation,
        fraction,
        data.skip_broken,
        run_profile(data),
        data.random_crop,
        base.config.head.state_length,
    )
    has_validation = bool(data.validation) or fraction > 0
    with world() as here:
        if here.is_main:
            memory = report(
                config, lambda changed: forecast_run(changed, base, statistics, here.size), room_of(here.device), ROOM
            )
            Console().print("\n".join([*views, memory]), highlight=False, markup=False, soft_wrap=True)
        stream = Stream(
            mixture,
            batch_size=data.batch_size,
            seed=config.run.seed,
            rank=here.rank,
            world_size=here.size,
            workers=data.workers,
            chunk_length=data.chunk_length,
            augment=data.augment,
        )
        try:
            trainer = Trainer(
                config,
                folder,
                here,
                stream,
                (lambda: validation_samples(mixture, data.chunk_length, data.validation_samples))
                if has_validation
                else None,
                statistics,
            )
            if here.is_main:
                _save(folder, config, statistics, base)
            trainer.run()
        finally:
            stream.close()


def _save(folder: Path, config: TrainConfig, statistics: Mapping[str, ActionStatistics], base: Base) -> None:
    tables = {name: item.to_json() for name, item in statistics.items()}
    write_whole(folder / RUN_STATISTICS_FILE, json.dumps({"action_config": tables}))
    if not (folder / BASE_FILE).is_file():
        write_whole(folder / BASE_FILE, json.dumps({"name": base.name, "sha256": checkpoint_hash(base.folder)}) + "\n")
    # The last: what has a config is a run.
    write_whole(folder / CONFIG_FILE, config.to_json())


def _check_base(folder: Path, base: Base) -> None:
    """Raises CheckpointError for another base than the run began with, which would be trained on, and merged into,
    without a word; FileError."""
    path = folder / BASE_FILE
    # Of runs before there was this file nobody knows.
    if not path.is_file():
        return
    told = read_json(path, FileError)
    with reading(path, FileError):
        if not isinstance(told, dict):
            raise TypeError("expected an object")
        before = text(told, "sha256")
    if (now := checkpoint_hash(base.folder)) != before:
        raise CheckpointError(
            f"model.checkpoint: {base.folder} has changed since the run began, with SHA-256 {before}, now {now}: put "
            "the checkpoint back that was there, or start a new run"
        )


def _read_config(folder: Path) -> TrainConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {CONFIG_FILE}: not a run's folder")
    content = read_bytes(path, FileError)
    with reading(path, FileError):
        return TrainConfig.from_json(content.decode("utf-8"))


def _statistics(path: Path, base: Base, config: TrainConfig) -> dict[str, ActionStatistics]:
    if not path.is_file():
        raise ValueError(f"data.statistics: expected a file that `xr0 data stats` wrote, there is none at {path}")
    xr0 = model_config(base.config, config)
    statistics = read_statistics(path, xr0.head.action_dim, xr0.std_epsilon, xr0.double_statistics)
    check_states(path, statistics, xr0.head.state_dim)
    return statistics


def _absolute(written: str) -> str:
    """A dataset's path, made absolute; an id of the hub, with its commit; the name of a function stays."""
    path, equals, weight = written.rpartition("=") if "=" in written else (written, "", "")
    if (source := find_on_hub(Path(path))) is not None:
        return str(pinned(source)) + equals + weight
    return (path if is_function(path) else str(Path(path).resolve())) + equals + weight
