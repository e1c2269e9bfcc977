"""Where a run's metrics are watched beside its own file: TensorBoard, and Weights & Biases if it is asked for."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from xr0_engine.files import one_line, read_json, reading, text
from xr0_engine.training.config import TrainConfig
from xr0_engine.types import FileError
from xr0_engine.whole import write_whole

WANDB_FILE = "wandb.json"
"""In a run's folder: by which id a resumed run goes on."""
LOCAL_MODES = ("offline", "disabled", "dryrun")
"""Of WANDB_MODE: nothing leaves the machine, and no key is needed."""


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self, failed: bool = False) -> None:
        """failed: the run ends by an error."""


def check_tracking(config: TrainConfig) -> None:
    """Before anything is loaded. Raises ValueError, with the remedy, for Weights & Biases that cannot be had."""
    if not config.run.wandb:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("run.wandb: wandb is not installed: pip install 'xr0-engine[wandb]', or leave run.wandb out")
    if os.environ.get("WANDB_MODE", "online") in LOCAL_MODES:
        return
    wandb = import_module("wandb")
    try:
        # It looks for a key, and asks the server for whom it is.
        wandb.Api()
    except wandb.errors.Error as fault:
        raise ValueError(
            f"run.wandb: {one_line(fault)} (`wandb login`, or WANDB_API_KEY; without a network WANDB_MODE=offline, and "
            "`wandb sync` afterwards)"
        ) from None


def trackers(folder: Path, config: TrainConfig, start_step: int) -> list[Tracker]:
    """Of a run's folder, which exists. start_step: what is reported behind it by an earlier start is void."""
    found: list[Tracker] = [TensorBoard(folder / "tensorboard", start_step)]
    if config.run.wandb:
        found.append(WeightsAndBiases(folder, config))
    return found


class TensorBoard:
    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool = False) -> None:
        self._writer.close()


class WeightsAndBiases:
    """config.run.wandb: a project, or an entity and a project as `entity/project`. A run that is resumed goes on under
    its id; offline, as WANDB_MODE has it, its folder is `wandb/` in the run's."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        entity, _, project = config.run.wandb.rpartition("/")
        known = _known_id(folder / WANDB_FILE)
        wandb = import_module("wandb")
        try:
            self._run: Any = wandb.init(
                project=project,
                entity=entity or None,
                name=folder.resolve().name,
                id=known,
                resume="allow",
                dir=str(folder),
                config=json.loads(config.to_json()),
            )
        except wandb.errors.Error as fault:
            again = f", or remove {folder / WANDB_FILE} for a new one there" if known else ""
            raise ValueError(
                f"run.wandb: {config.run.wandb}: {one_line(fault)} (a project that you may write to{again})"
            ) from None
        write_whole(folder / WANDB_FILE, json.dumps({"id": self._run.id}) + "\n")
        # Steps that a killed run reported come again: the axis is ours, not the order of arrival.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


def _known_id(path: Path) -> str | None:
    if not path.is_file():
        return None
    told = read_json(path, FileError)
    with reading(path, FileError):
        if not isinstance(told, dict):
            raise TypeError("expected an object")
        return text(told, "id")
