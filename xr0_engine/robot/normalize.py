"""Action statistics: robot units to the model's units and back (spec section 3.3). NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import SETTINGS_FILE, find_settings, read_json, table
from xr0_engine.part_configs import STEPS
from xr0_engine.types import CheckpointError

# Where statistics name no active columns, one whose std is not above this does not move in the training data: the model
# neither sees nor sets it.
ACTIVE_STD = 1e-5

LARGEST = 1e9
"""Of a mean or std, in the robot's units: encoders of 24 bits count to 2e7. What float32 can hold, but an action of
twice the std cannot, would make actions infinite."""

STATISTICS_FILE = SETTINGS_FILE


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Mean and standard deviation of one robot type's actions, per timestep of the chunk and column.

    mean, std: (T, A) float32, robot units. epsilon: added to std; 0 as the hub code, 1e-6 as the post-training code.
    active_columns: those that the model sees and sets whatever their std, at every timestep, as the post-training code
    has them; the others decode to 0. None: the hub's rule, std above ACTIVE_STD.

    Raises ValueError for active columns that are none, twice the same or outside the width, or that cannot be
    normalised since std and epsilon are 0.
    """

    mean: np.ndarray
    std: np.ndarray
    epsilon: float
    active_columns: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        columns, width = self.active_columns, self.mean.shape[-1]
        if columns is None:
            return
        strange = [column for column in columns if not 0 <= column < width]
        if not columns or strange or len(set(columns)) != len(columns):
            raise ValueError(
                f"active_columns: expected numbers from 0 to {width - 1}, each once, got {list(columns) or 'none'}"
            )
        still = [column for column in columns if (self._scale(len(self.std))[:, column] <= 0).any()]
        if still:
            raise ValueError(
                f"active columns {still} have std 0, and epsilon is 0 too, so nothing can be divided by it: "
                "set std_epsilon in config.json to what the model was trained with (1e-6 in the post-training code), "
                "or take them out of active_columns"
            )

    @property
    def chunk_length(self) -> int:
        """T, the number of actions that one inference gives."""
        return int(self.mean.shape[0])

    @cached_property
    def action_mask(self) -> np.ndarray:
        """(T, A) float32, 1 = column used at this timestep, 0 = column that does not move."""
        if self.active_columns is None:
            return (self.std > ACTIVE_STD).astype(np.float32)
        mask = np.zeros_like(self.std, dtype=np.float32)
        mask[:, list(self.active_columns)] = 1
        return mask

    def unreasonable(self, actions: np.ndarray, deviations: float, start: int = 0) -> list[int]:
        """The active columns of (P, A) actions in robot units that are further from the mean than so many std, at any
        step from `start` on."""
        rows = self._rows(actions)
        apart = np.abs(actions - self.mean[:rows]) > deviations * self._scale(rows)
        return [int(column) for column in np.flatnonzero((apart & (self.action_mask[:rows] > 0))[start:].any(0))]

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Robot units to the model's: `(a - mean) / (std + epsilon)`, and 0 where action_mask is 0.

        actions: (..., P, A), P <= T; they are the chunk's rows 0 .. P-1. Returns the same shape, float32.
        Raises ValueError for another shape.
        """
        rows = self._rows(actions)
        active = self.action_mask[:rows] > 0
        scale = np.where(active, self._scale(rows), np.float32(1))
        return np.where(active, (actions - self.mean[:rows]) / scale, 0).astype(np.float32)

    def denormalize(self, normalized: np.ndarray) -> np.ndarray:
        """The model's units to the robot's, the inverse of normalize on active columns: `a * (std + epsilon) + mean`.

        Where active_columns are named, the others are 0. normalized: (..., P, A), P <= T; they are the chunk's rows 0
        .. P-1. Returns the same shape, float32. Raises ValueError for another shape.
        """
        rows = self._rows(normalized)
        actions: np.ndarray = normalized * self._scale(rows) + self.mean[:rows]
        if self.active_columns is not None:
            actions = np.where(self.action_mask[:rows] > 0, actions, 0)
        return actions.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As a robot type's entry in `action_config`."""
        tables = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return tables if self.active_columns is None else {**tables, "active_columns": list(self.active_columns)}

    def _scale(self, rows: int) -> np.ndarray:
        scale: np.ndarray = self.std[:rows] + np.float32(self.epsilon)
        return scale

    def _rows(self, actions: np.ndarray) -> int:
        length, width = self.mean.shape
        if actions.ndim < 2 or actions.shape[-1] != width or actions.shape[-2] > length:
            raise ValueError(f"actions: expected shape (up to {length}, {width}), got {actions.shape}")
        return int(actions.shape[-2])


def load_statistics(folder: Path, action_dim: int, epsilon: float) -> dict[str, ActionStatistics]:
    """Read the statistics of every robot type from the checkpoint folder's preprocessor_config.json, or from the
    processor_config.json that transformers 5 writes in its place.

    Raises CheckpointError that names the file and, for each robot type at fault, what is wrong, and for two files that
    contradict each other.
    """
    found = find_settings(folder)
    if not found:
        raise CheckpointError(
            f"{folder} holds no {STATISTICS_FILE}: the action statistics are missing; copy the one of the training"
        )
    told = {path: raw["action_config"] for path, raw in found.items() if isinstance(raw, Mapping) and _has(raw)}
    first = next(iter(told or found))
    if any(one != told[first] for one in told.values()):
        raise CheckpointError(
            f"{' and '.join(map(str, told))} hold different action statistics (`action_config`): keep those of the "
            "training alone"
        )
    return _statistics(first, found[first], action_dim, epsilon)


def read_statistics(path: Path, action_dim: int, epsilon: float) -> dict[str, ActionStatistics]:
    """As load_statistics, from any JSON file with an `action_config`."""
    return _statistics(path, read_json(path), action_dim, epsilon)


def _has(settings: Mapping[str, Any]) -> bool:
    return settings.get("action_config") is not None


def _statistics(path: Path, config: Any, action_dim: int, epsilon: float) -> dict[str, ActionStatistics]:
    robot_types = config.get("action_config") if isinstance(config, Mapping) else None
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
    columns = raw.get("active_columns")
    if columns is None:
        return ActionStatistics(mean, std, epsilon)
    if not isinstance(columns, list) or not all(type(column) is int for column in columns):
        raise ValueError(f"active_columns: expected a list of column numbers, got {columns!r:.80}")
    return ActionStatistics(mean, std, epsilon, tuple(sorted(columns)))


def _table(name: str, raw: Any, action_dim: int) -> np.ndarray:
    numbers = table(raw, name)
    if len(numbers) == 0 or numbers.shape[1] != action_dim:
        raise ValueError(f"{name}: expected shape (T, {action_dim}), got {numbers.shape}")
    if len(numbers) > STEPS[1]:
        raise ValueError(f"{name}: expected at most {STEPS[1]} timesteps, got {len(numbers)}")
    if np.abs(numbers).max() > LARGEST:
        raise ValueError(f"{name}: expected values up to {LARGEST:g}, got {np.abs(numbers).max():g}")
    return numbers.astype(np.float32)
