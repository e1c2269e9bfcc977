"""LeRobot's batches to observations, chunks to its actions: columns, views, and what deltas are relative to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xr0_engine import Observation
from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT

STATE = "observation.state"
IMAGES = "observation.images."
# Of layout bimanual: deltas to the state's column of the same number.
JOINTS = frozenset(
    column
    for arm in (LEFT, RIGHT)
    for part in (arm.gripper, arm.joints)
    for column in np.atleast_1d(np.arange(BIMANUAL_COLUMNS)[part]).tolist()
)


@dataclass(frozen=True)
class RobotMap:
    """How a LeRobot robot and the policy see each other.

    images: view key -> key in LeRobot's batch. state_columns, action_columns: for each entry of LeRobot's state and
    action the policy's column. state_width, action_width: of the policy. layout: plain or bimanual. prepared: see
    XR0Config. Raises ValueError for columns that the policy does not have or LeRobot cannot execute.
    """

    images: Mapping[str, str]
    state_columns: tuple[int, ...]
    action_columns: tuple[int, ...]
    state_width: int
    action_width: int
    layout: str
    robot_type: str
    prepared: bool = False

    def __post_init__(self) -> None:
        for name, columns, width in (
            ("state_columns", self.state_columns, self.state_width),
            ("action_columns", self.action_columns, self.action_width),
        ):
            if not columns or max(columns) >= width:
                raise ValueError(f"{name}: expected columns below {width}, at least one, got {list(columns)}")
        if self.layout == "bimanual":
            away = sorted(set(self.action_columns) - JOINTS)
            unseen = sorted(set(self.action_columns) & JOINTS - set(self.state_columns))
            if away:
                raise ValueError(
                    f"action_columns: layout bimanual is executed by joints and grippers, {sorted(JOINTS)}; "
                    f"columns {away} move the hands in the pose of the observation, which LeRobot's state does not tell"
                )
            if unseen:
                raise ValueError(
                    f"state_columns: actions {unseen} are relative to the state's columns of the same number, which "
                    "are not in it"
                )
        elif self.layout != "plain":
            raise ValueError(f"layout: expected plain or bimanual, got {self.layout!r}")

    @property
    def takes_prefix(self) -> bool:
        """Whether leftover actions can be told the policy in the frame of a later observation."""
        return self.layout == "plain"

    def observations(self, batch: Mapping[str, Any]) -> list[Observation]:
        """One per row. Raises ValueError that names the key and what is wrong with it."""
        state = _tensor(batch, STATE, 2)
        rows = len(state)
        if state.shape[1] != len(self.state_columns):
            raise ValueError(f"{STATE}: expected {len(self.state_columns)} numbers, got {state.shape[1]}")
        if not bool(torch.isfinite(state).all()):
            raise ValueError(f"{STATE}: expected finite numbers")
        numbers = state.detach().to("cpu", torch.float32).numpy()
        images = {view: _pictures(batch, key, rows) for view, key in self.images.items()}
        tasks = _tasks(batch, rows)
        found = []
        for row in range(rows):
            full = np.zeros((1, self.state_width), np.float32)
            full[0, list(self.state_columns)] = numbers[row]
            pictures = {view: frames[row] for view, frames in images.items()}
            found.append(Observation(pictures, tasks[row], full, robot_type=self.robot_type, prepared=self.prepared))
        return found

    def actions(self, chunk: np.ndarray, observation: Observation) -> np.ndarray:
        """(T, action_width) of the policy -> (T, action columns) float32 for LeRobot's robot."""
        columns = list(self.action_columns)
        chosen = np.array(chunk[:, columns], dtype=np.float32)
        if self.layout == "bimanual":
            chosen += observation.state[0, columns]
        return chosen

    def prefix(self, left_over: np.ndarray, length: int) -> np.ndarray | None:
        """The first `length` leftover actions as the policy's prefix; None if there are none.

        left_over: (T, action columns), LeRobot's: it is filled up with rows of zeros, which are no actions.
        """
        if left_over.ndim != 2 or left_over.shape[1] != len(self.action_columns):
            raise ValueError(
                f"prev_chunk_left_over: expected (steps, {len(self.action_columns)}), got {left_over.shape}"
            )
        if not np.isfinite(left_over).all():
            raise ValueError("prev_chunk_left_over: expected finite numbers")
        real = np.flatnonzero(left_over.any(axis=1))
        length = min(length, int(real[-1]) + 1 if len(real) else 0)
        if length == 0:
            return None
        rows = np.zeros((length, self.action_width), np.float32)
        rows[:, list(self.action_columns)] = left_over[:length]
        return rows


def default_columns(given: Sequence[int] | None, count: int, layout: str, name: str) -> tuple[int, ...]:
    """The policy's columns for `count` numbers of LeRobot's. Raises ValueError that names the field."""
    if given is None:
        if layout != "plain":
            raise ValueError(f"{name}: expected {count} columns of layout {layout}, got none: it has no default")
        return tuple(range(count))
    if len(given) != count:
        raise ValueError(f"{name}: expected {count} columns, one for each number of LeRobot's, got {len(given)}")
    return tuple(given)


def _tensor(batch: Mapping[str, Any], key: str, dimensions: int) -> Tensor:
    value = batch.get(key)
    if not isinstance(value, Tensor):
        raise ValueError(f"{key}: expected a tensor, got {type(value).__name__}; the batch has {sorted(batch)}")
    if value.ndim != dimensions:
        raise ValueError(f"{key}: expected {dimensions} dimensions, batch first, got {tuple(value.shape)}")
    return value


def _pictures(batch: Mapping[str, Any], key: str, rows: int) -> np.ndarray:
    """(rows, height, width, 3) uint8 of LeRobot's (rows, 3, height, width), float in [0, 1] or uint8."""
    images = _tensor(batch, key, 4)
    if images.shape[:2] != (rows, 3):
        raise ValueError(f"{key}: expected ({rows}, 3, height, width), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise ValueError(f"{key}: expected uint8 or floats in [0, 1], got {images.dtype}")
        images = images.detach().to(torch.float32)
        # Also what is not a number.
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError(
                f"{key}: expected values in [0, 1], got {float(images.min()):g} to {float(images.max()):g}"
            )
        images = (images * 255).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())


def _tasks(batch: Mapping[str, Any], rows: int) -> list[str]:
    task = batch.get("task")
    tasks = [task] * rows if isinstance(task, str) else list(task) if isinstance(task, list | tuple) else []
    if len(tasks) != rows or not all(isinstance(text, str) and text.strip() for text in tasks):
        raise ValueError(f"task: expected {rows} texts, got {task!r:.80}: give one with --task or in the data set")
    return tasks
