"""Actions as rows that can be compared: from a chunk's frame to one fixed frame, and back (spec sections 3.4 and 5).

A chunk of layout `bimanual` is anchored at the pose of its observation, so two chunks cannot be compared or joined as
they are. The executor keeps every action as a row in one fixed frame: the same 32 columns, anchored at the world's
origin, which makes positions, joints and grippers absolute and rotations the axis-angle of the absolute rotation.
Other layouts keep their actions as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from xr0_engine.robot.decode import (
    BIMANUAL_COLUMNS,
    LEFT,
    RIGHT,
    ArmPose,
    BimanualPose,
    anchor,
    recover,
    rotation_exp,
    rotation_log,
)


class Frame(Protocol):
    """layout: as in the embodiment profile. width: A. angular: (A,) bool, columns of axis-angle rotations. delta: (A,)
    bool, columns that say how far to move in one step instead of where to: at rest they are 0."""

    layout: str
    width: int
    angular: np.ndarray
    delta: np.ndarray

    def absolute(self, actions: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        """A chunk (T, A) as rows (T, A) float64. Raises ValueError for another shape or values that are not finite."""

    def anchored(self, rows: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        """The inverse of absolute: rows (P, A) as actions in the frame of a new observation, (P, A) float32."""

    def start(self, origin: BimanualPose | None) -> np.ndarray | None:
        """The row (A,) at which the robot stands, if its pose tells."""

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """From reference to row, (A,), per column; for rotations the axis-angle of the turn between them."""

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        """The inverse of difference: the row (A,) that differs so much from `row`."""


class PlainFrame:
    """Actions that are not anchored. delta_columns: those that say how far to move, not where to; see Frame.delta.

    Raises ValueError for columns outside the width.
    """

    def __init__(self, width: int, delta_columns: Iterable[int]) -> None:
        columns = list(delta_columns)
        if any(not 0 <= column < width for column in columns):
            raise ValueError(f"delta_columns: expected 0 to {width - 1}, got {columns}")
        self.layout = "plain"
        self.width = width
        self.angular = np.zeros(width, bool)
        self.delta = np.zeros(width, bool)
        self.delta[columns] = True

    def absolute(self, actions: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        return _checked(actions, self.width)

    def anchored(self, rows: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        return rows.astype(np.float32)

    def start(self, origin: BimanualPose | None) -> np.ndarray | None:
        return None

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        return row - reference

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        return row + difference


_AT_ORIGIN = ArmPose(np.zeros(3), np.eye(3), np.zeros(6), np.zeros(1))
_WORLD = BimanualPose(_AT_ORIGIN, _AT_ORIGIN)
_ROTATIONS = np.concatenate([np.arange(BIMANUAL_COLUMNS)[arm.rotation] for arm in (LEFT, RIGHT)])


class BimanualFrame:
    """Layout `bimanual`: rows are actions anchored at the world's origin."""

    def __init__(self) -> None:
        self.layout = "bimanual"
        self.width = BIMANUAL_COLUMNS
        self.angular = np.isin(np.arange(BIMANUAL_COLUMNS), _ROTATIONS)
        self.delta = np.zeros(BIMANUAL_COLUMNS, bool)

    def absolute(self, actions: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        return anchor(recover(_checked(actions, self.width), _required(origin)), _WORLD)

    def anchored(self, rows: np.ndarray, origin: BimanualPose | None) -> np.ndarray:
        return anchor(recover(rows, _WORLD), _required(origin)).astype(np.float32)

    def start(self, origin: BimanualPose | None) -> np.ndarray | None:
        return self.absolute(np.zeros((1, self.width)), origin)[0]

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        change = row - reference
        change[_ROTATIONS] = rotation_log(np.swapaxes(_rotations(reference), -1, -2) @ _rotations(row)).ravel()
        return change

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        result = row + difference
        result[_ROTATIONS] = rotation_log(_rotations(row) @ _rotations(difference)).ravel()
        return result


def coast(frame: Frame, row: np.ndarray, before: np.ndarray, keep: float) -> np.ndarray:
    """The row (A,) after `row`, which came after `before`, when there is no action: with `keep` of the last motion.

    keep: 0 stands still (hold), below 1 decelerates. No motion is known if row is before: then it stands still.
    """
    after = frame.moved(row, keep * frame.difference(row, before)) if keep else row.copy()
    after[frame.delta] = keep * row[frame.delta]
    return after


def _rotations(row: np.ndarray) -> np.ndarray:
    return rotation_exp(row[_ROTATIONS].reshape(2, 3))


def _required(origin: BimanualPose | None) -> BimanualPose:
    if origin is None:
        raise ValueError("origin: expected the robot's pose at the observation (layout bimanual), got None")
    return origin


def _checked(actions: np.ndarray, width: int) -> np.ndarray:
    rows = np.array(actions, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] != width or len(rows) == 0:
        raise ValueError(f"actions: expected shape (T, {width}), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("actions: expected finite values, got NaN or infinity")
    return rows
