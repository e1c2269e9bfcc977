"""Action statistics: robot units to the model's units and back (spec section 3.3). NumPy only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.types import CheckpointError

# A column whose std is not above this does not move in the training data: the model neither sees nor sets it.
ACTIVE_STD = 1e-5

STATISTICS_FILE = "preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Mean and standard deviation of one robot type's actions, per timestep of the chunk and column.

    mean, std: (T, A) float32, robot units. epsilon: added to std; 0 as the hub code, 1e-6 as the post-training code.
    """

    mean: np.ndarray
    std: np.ndarray
    epsilon: float

    @property
    def chunk_length(self) -> int:
        """T, the number of actions that one inference gives."""
        return int(self.mean.shape[0])

    @cached_property
    def action_mask(self) -> np.ndarray:
        """(T, A) float32, 1 = column used at this timestep, 0 = column that does not move."""
        return (self.std > ACTIVE_STD).astype(np.float32)

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Robot units to the model's: `(a - mean) / (std + epsilon)`, and 0 where action_mask is 0.

        actions: (..., P, A), P <= T; they are the chunk's rows 0 .. P-1. Returns the same shape, float32.
        Raises ValueError for another shape.
        """
        rows = self._rows(actions)
        active = self.action_mask[:rows] > 0
        scale = np.where(active, self.std[:rows] + np.float32(self.epsilon), np.float32(1))
        return np.where(active, (actions - self.mean[:rows]) / scale, 0).astype(np.float32)

    def denormalize(self, normalized: np.ndarray) -> np.ndarray:
        """The model's units to the robot's, the inverse of normalize on active columns: `a * (std + epsilon) + mean`.

        normalized: (..., P, A), P <= T; they are the chunk's rows 0 .. P-1. Returns the same shape, float32.
        Raises ValueError for another shape.
        """
        rows = self._rows(normalized)
        scale = self.std[:rows] + np.float32(self.epsilon)
        actions: np.ndarray = normalized * scale + self.mean[:rows]
        return actions.astype(np.float32)

    def _rows(self, actions: np.ndarray) -> int:
        length, width = self.mean.shape
        if actions.ndim < 2 or actions.shape[-1] != width or actions.shape[-2] > length:
            raise ValueError(f"actions: expected shape (up to {length}, {width}), got {actions.shape}")
        return int(actions.shape[-2])


def load_statistics(folder: Path, action_dim: int, epsilon: float) -> dict[str, ActionStatistics]:
    """Read the statistics of every robot type from the checkpoint folder's preprocessor_config.json.

    Raises CheckpointError that names the file and, for each robot type at fault, what is wrong.
    """
    path = folder / STATISTICS_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no {STATISTICS_FILE}: the action statistics are missing")
    return read_statistics(path, action_dim, epsilon)


def read_statistics(path: Path, action_dim: int, epsilon: float) -> dict[str, ActionStatistics]:
    """As load_statistics, from any JSON file with an `action_config`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    robot_types = config.get("action_config") if isinstance(config, dict) else None
    if not isinstance(robot_types, dict) or not robot_types:
        raise CheckpointError(f"{path} lacks `action_config`: {{robot type: {{mean, std}}}}")
    statistics, faults = {}, []
    for robot_type, raw in robot_types.items():
        try:
            statistics[robot_type] = _read(raw, action_dim, epsilon)
        except ValueError as error:
            faults.append(f"robot type {robot_type!r}: {error}")
    if faults:
        raise CheckpointError(f"{path}: " + "; ".join(faults))
    return statistics


def select_robot_type(statistics: Mapping[str, ActionStatistics], robot_type: str | None) -> str:
    """The robot type that an observation means: itself if known; if None, the checkpoint's only one.

    Raises ValueError that lists the known robot types.
    """
    known = ", ".join(sorted(statistics))
    if robot_type is None:
        if len(statistics) != 1:
            raise ValueError(f"robot_type: expected one of {known}, got None (this checkpoint holds several)")
        return next(iter(statistics))
    if not isinstance(robot_type, str) or robot_type not in statistics:
        raise ValueError(f"robot_type: expected one of {known}, got {robot_type!r}")
    return robot_type


def _read(raw: Any, action_dim: int, epsilon: float) -> ActionStatistics:
    if not isinstance(raw, dict) or not {"mean", "std"} <= raw.keys():
        raise ValueError("expected a mapping with mean and std")
    mean, std = (_table(name, raw[name], action_dim) for name in ("mean", "std"))
    if mean.shape != std.shape:
        raise ValueError(f"mean has {len(mean)} timesteps, std has {len(std)}")
    if (std < 0).any():
        raise ValueError("std holds a negative value")
    return ActionStatistics(mean, std, epsilon)


def _table(name: str, raw: Any, action_dim: int) -> np.ndarray:
    try:
        numbers = np.array(raw)
    except ValueError:
        raise ValueError(f"{name} is ragged: expected rows of equal length") from None
    if numbers.dtype.kind not in "fiu":
        raise ValueError(f"{name}: expected a table of numbers")
    # A value that float32 cannot hold becomes infinite and is refused below.
    with np.errstate(over="ignore"):
        table = numbers.astype(np.float32)
    if table.ndim != 2 or len(table) == 0 or table.shape[1] != action_dim:
        raise ValueError(f"{name}: expected shape (T, {action_dim}), got {table.shape}")
    if not np.isfinite(table).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    return table
