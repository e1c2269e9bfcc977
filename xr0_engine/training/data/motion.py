"""What a robot did and felt over one episode, and the targets that follow any tick of it (spec section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from xr0_engine.robot.decode import ArmPose, BimanualPose, anchor


class Motion(Protocol):
    """A trajectory at the robot's control rate."""

    @property
    def columns(self) -> np.ndarray:
        """(A,) bool, the action columns that it knows."""

    def __len__(self) -> int: ...

    def state(self, tick: int) -> np.ndarray:
        """(1, S) float32, the proprio state at a tick."""

    def actions(self, tick: int, length: int) -> np.ndarray:
        """(length, A) float64, robot units: the targets from a tick on; beyond the end the last one is repeated."""


@dataclass(frozen=True, eq=False)
class BimanualMotion:
    """Two arms, absolute poses; actions come anchored at the measured pose. proprios, targets: N poses each.

    columns: (32,) bool. Parts that a robot does not report stand still in the poses, and are not among the columns.
    periods: action column -> the period of a joint whose angle wraps; in targets it is unwrapped.
    """

    proprios: BimanualPose
    targets: BimanualPose
    columns: np.ndarray
    periods: Mapping[int, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.proprios.left.position_m)

    def state(self, tick: int) -> np.ndarray:
        return take(self.proprios, tick).state()

    def actions(self, tick: int, length: int) -> np.ndarray:
        ticks = np.minimum(np.arange(tick, tick + length), len(self) - 1)
        actions = anchor(take(self.targets, ticks), take(self.proprios, tick))
        for column, period in self.periods.items():
            actions[:, column] -= period * np.round(actions[0, column] / period)
        actions[:, ~self.columns] = 0
        return actions


@dataclass(frozen=True, eq=False)
class PlainMotion:
    """States and actions as columns. states: (N, S) float32. targets: (N, A) float64.

    origins: (N, A) float64, what is subtracted at the observation, 0 where actions are taken as they are.
    columns: (A,) bool.
    """

    states: np.ndarray
    targets: np.ndarray
    origins: np.ndarray
    columns: np.ndarray

    def __len__(self) -> int:
        return len(self.states)

    def state(self, tick: int) -> np.ndarray:
        return self.states[tick][None]

    def actions(self, tick: int, length: int) -> np.ndarray:
        ticks = np.minimum(np.arange(tick, tick + length), len(self) - 1)
        actions: np.ndarray = self.targets[ticks] - self.origins[tick]
        return actions


def take(poses: BimanualPose, ticks: int | np.ndarray) -> BimanualPose:
    """Some poses of a trajectory, or one."""
    left, right = (
        ArmPose(arm.position_m[ticks], arm.rotation[ticks], arm.joints_rad[ticks], arm.gripper[ticks])
        for arm in (poses.left, poses.right)
    )
    return BimanualPose(left, right)


def resampled_ticks(count: int, from_hz: float, to_hz: float) -> np.ndarray:
    """For every tick at to_hz, which of `count` measurements at from_hz is nearest in time; ties go to the later one.

    Returns (ticks,) int64. The last tick is the last that has a measurement within half a period of theirs.
    """
    if from_hz == to_hz:
        return np.arange(count)
    ticks = math.floor((count - 1) / from_hz * to_hz + 0.5) + 1
    nearest = np.floor(np.arange(ticks) / to_hz * from_hz + 0.5).astype(np.int64)
    return nearest[nearest < count]
