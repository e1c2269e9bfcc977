"""Statistics: robot units to the model's units and back (spec sections 3.3 and 8). NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import SETTINGS_FILE, find_settings, read_json
from xr0_engine.robot.quantiles import ACTIVE_STD as ACTIVE_STD
from xr0_engine.robot.quantiles import (
    ROBODOJO_RULE,
    Quantiles,
    StateStatistics,
    read_quantiles,
    read_state,
    read_table,
    refuse_unowned,
)
from xr0_engine.types import CheckpointError

STATISTICS_FILE = SETTINGS_FILE


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Mean and standard deviation of one robot type's actions, per timestep of the chunk and column.

    mean, std: (T, A), robot units, float32, or float64 for families whose statistics are applied in it. epsilon: added
    to std; 0 as the hub code, 1e-6 as the post-training code. active_columns: those that the model sees and sets
    whatever their std, at every timestep, as the post-training code has them; the others decode to 0. None: the hub's
    rule, std above ACTIVE_STD. quantiles: the columns that go by these instead, scaled so that q01 and q99 are -1 and
    1. state: how the robot type's states are normalised; None: not. still_passes: an active column passes as it is,
    both ways, where its std is not above ACTIVE_STD, as RoboDojo's does (spec section 8).

    Raises ValueError for active columns that are none, twice the same or outside the width, or that cannot be
    normalised since std and epsilon are 0; and for still_passes without active columns.
    """

    mean: np.ndarray
    std: np.ndarray
    epsilon: float
    active_columns: tuple[int, ...] | None = None
    quantiles: Quantiles | None = None
    state: StateStatistics | None = None
    still_passes: bool = False

    def __post_init__(self) -> None:
        columns, width = self.active_columns, self.mean.shape[-1]
        if columns is None:
            if self.still_passes:
                raise ValueError(f"active_columns: missing; rule {ROBODOJO_RULE} goes by them, not by std")
            return
        strange = [column for column in columns if not 0 <= column < width]
        if not columns or strange or len(set(columns)) != len(columns):
            raise ValueError(
                f"active_columns: expected numbers from 0 to {width - 1}, each once, got {list(columns) or 'none'}"
            )
        still = [column for column in columns if (self._scale[:, column] <= 0).any()]
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
        apart = np.abs(actions - self._offset[:rows]) > deviations * self._scale[:rows]
        return [int(column) for column in np.flatnonzero((apart & (self.action_mask[:rows] > 0))[start:].any(0))]

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """Robot units to the model's: `(a - mean) / (std + epsilon)`, and 0 where action_mask is 0.

        actions: (..., P, A), P <= T; they are the chunk's rows 0 .. P-1. Returns the same shape, float32.
        Raises ValueError for another shape.
        """
        rows = self._rows(actions)
        active = self.action_mask[:rows] > 0
        scale = np.where(active, self._scale[:rows], self._scale.dtype.type(1))
        return np.where(active, (actions - self._offset[:rows]) / scale, 0).astype(np.float32)

    def denormalize(self, normalized: np.ndarray) -> np.ndarray:
        """The model's units to the robot's, the inverse of normalize on active columns: `a * (std + epsilon) + mean`.

        Where active_columns are named, the others are 0. normalized: (..., P, A), P <= T; they are the chunk's rows 0
        .. P-1. Returns the same shape, float32. Raises ValueError for another shape.
        """
        rows = self._rows(normalized)
        actions: np.ndarray = normalized * self._scale[:rows] + self._offset[:rows]
        if self.active_columns is not None:
            actions = np.where(self.action_mask[:rows] > 0, actions, 0)
        return actions.astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """As a robot type's entry in `action_config`."""
        told: dict[str, Any] = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        if self.active_columns is not None:
            told["active_columns"] = list(self.active_columns)
        if self.still_passes:
            told["rule"] = ROBODOJO_RULE
        if self.quantiles is not None:
            told |= self.quantiles.to_json()
        return told if self.state is None else {**told, "state": self.state.to_json()}

    @cached_property
    def _scale(self) -> np.ndarray:
        """(T, A): what the model's units are multiplied by; then _offset is added."""
        scale: np.ndarray = self.std + self.std.dtype.type(self.epsilon)
        if self.still_passes:
            scale = np.where(self.std > ACTIVE_STD, scale, scale.dtype.type(1))
        return scale if self.quantiles is None else self.quantiles.placed(scale, self.quantiles.half_range())

    @cached_property
    def _offset(self) -> np.ndarray:
        mean = np.where(self.std > ACTIVE_STD, self.mean, 0) if self.still_passes else self.mean
        return mean if self.quantiles is None else self.quantiles.placed(mean, self.quantiles.middle())

    def _rows(self, actions: np.ndarray) -> int:
        length, width = self.mean.shape
        if actions.ndim < 2 or actions.shape[-1] != width or actions.shape[-2] > length:
            raise ValueError(f"actions: expected shape (up to {length}, {width}), got {actions.shape}")
        return int(actions.shape[-2])


def load_statistics(folder: Path, action_dim: int, epsilon: float, double: bool = False) -> dict[str, ActionStatistics]:
    """Read the statistics of every robot type from the checkpoint folder's preprocessor_config.json, or from the
    processor_config.json that transformers 5 writes in its place. double: whether they are kept, and applied, in
    float64 (ModelConfig.double_statistics), as an engine must; float32 else.

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
    return _statistics(first, found[first], action_dim, epsilon, double)


def read_statistics(path: Path, action_dim: int, epsilon: float, double: bool = False) -> dict[str, ActionStatistics]:
    """As load_statistics, from any JSON file with an `action_config`."""
    return _statistics(path, read_json(path), action_dim, epsilon, double)


def _has(settings: Mapping[str, Any]) -> bool:
    return settings.get("action_config") is not None


def _statistics(path: Path, config: Any, action_dim: int, epsilon: float, double: bool) -> dict[str, ActionStatistics]:
    robot_types = config.get("action_config") if isinstance(config, Mapping) else None
    if not isinstance(robot_types, dict) or not robot_types:
        raise CheckpointError(f"{path} lacks `action_config`: {{robot type: {{mean, std}}}}")
    statistics, faults = {}, []
    for robot_type, raw in robot_types.items():
        try:
            statistics[robot_type] = _read(raw, action_dim, epsilon, np.float64 if double else np.float32)
        except ValueError as error:
            faults.append(f"robot type {robot_type!r}: {error}")
    if faults:
        raise CheckpointError(f"{path}: " + "; ".join(faults))
    return statistics


def check_states(where: str | Path, statistics: Mapping[str, ActionStatistics], width: int) -> None:
    """Raises CheckpointError for states that are normalised in another number of columns than the model's, width.

    where: the file or folder that they are from.
    """
    for name, told in statistics.items():
        if told.state is not None and len(told.state.q01) != width:
            raise CheckpointError(
                f"{where}: statistics of robot type {name!r}: state: expected q01 and q99 of {width} columns, got "
                f"{len(told.state.q01)}"
            )


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


def _read(raw: Any, action_dim: int, epsilon: float, dtype: type[np.floating]) -> ActionStatistics:
    if not isinstance(raw, dict) or not {"mean", "std"} <= raw.keys():
        raise ValueError("expected a mapping with mean and std")
    mean, std = (read_table(name, raw[name], action_dim).astype(dtype) for name in ("mean", "std"))
    if mean.shape != std.shape:
        raise ValueError(f"mean has {len(mean)} timesteps, std has {len(std)}")
    if (std < 0).any():
        raise ValueError("std holds a negative value")
    if dtype is np.float64:
        # Where they are kept in float32, no state is normalised and no action goes by quantiles.
        refuse_unowned(raw)
    rule, quantiles = raw.get("rule"), None
    if rule is not None and (rule != ROBODOJO_RULE or dtype is not np.float64):
        expected = (
            f"{ROBODOJO_RULE} or none" if dtype is np.float64 else "none, as config.json describes Xiaomi-Robotics-0"
        )
        raise ValueError(f"rule: expected {expected}, got {rule!r:.80}")
    if raw.get("quantile_columns") is not None:
        if rule is None:
            raise ValueError(
                f"quantile_columns: expected with rule {ROBODOJO_RULE} alone; other actions go by mean and std"
            )
        quantiles = read_quantiles(raw, action_dim, len(mean))
    state = None if raw.get("state") is None else read_state(raw["state"])
    columns = raw.get("active_columns")
    if columns is not None:
        if not isinstance(columns, list) or not all(type(column) is int for column in columns):
            raise ValueError(f"active_columns: expected a list of column numbers, got {columns!r:.80}")
        columns = tuple(sorted(columns))
    return ActionStatistics(mean, std, epsilon, columns, quantiles, state, rule is not None)
