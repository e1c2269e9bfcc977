"""Two arms, a waist and a base that drives in 60 columns: XR-1's layouts (spec section 8). NumPy only.

Which column is what, and whether a gripper's is a difference or absolute, is data: `MOBILE` and `ROBODOJO`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from xr0_engine.robot.decode import (
    check_rotations,
    check_single,
    checked_actions,
    checked_part,
    count_targets,
    rotation_exp,
    rotation_log,
)

MOBILE_COLUMNS = 60
STATE_JOINTS = 7
"""Columns that an arm's joints have in the state; a shorter arm leaves the rest 0."""


@dataclass(frozen=True)
class ArmPlace:
    """Where one arm stands in the columns of an action, and of a state."""

    position: slice
    rotation: slice
    gripper: int
    state_joints: slice
    state_gripper: int


@dataclass(frozen=True)
class Columns:
    """A layout's columns. gripper_is_absolute: a gripper's column is its target, else target minus current. waist:
    target minus current. base_velocity: as it is, never a difference. None: the layout has none."""

    left: ArmPlace
    right: ArmPlace
    gripper_is_absolute: bool
    waist: int | None = None
    base_velocity: slice | None = None

    @property
    def rotations(self) -> list[int]:
        return [column for arm in (self.left, self.right) for column in range(MOBILE_COLUMNS)[arm.rotation]]


MOBILE = Columns(
    ArmPlace(slice(0, 3), slice(3, 6), 6, state_joints=slice(0, 7), state_gripper=7),
    ArmPlace(slice(8, 11), slice(11, 14), 14, state_joints=slice(8, 15), state_gripper=15),
    gripper_is_absolute=False,
    waist=16,
    base_velocity=slice(17, 20),
)
"""The post-training code's, and the base checkpoint's."""

ROBODOJO = Columns(
    ArmPlace(slice(0, 3), slice(3, 6), 7, state_joints=slice(0, 7), state_gripper=7),
    ArmPlace(slice(8, 11), slice(11, 14), 15, state_joints=slice(8, 15), state_gripper=15),
    gripper_is_absolute=True,
)
"""The older RoboDojo checkpoint's."""


@dataclass(frozen=True, eq=False)
class MobileArm:
    """Absolute pose of one arm, or a trajectory; `...` is () or (T,), the same for all.

    position_m: (..., 3), end effector, metres. rotation: (..., 3, 3). gripper: (..., 1), robot units. joints_rad: (...,
    up to 7), none where they are not known, as in targets. Kept as float64. Raises ValueError for another shape, values
    that are not finite, and matrices that are no rotation.
    """

    position_m: np.ndarray
    rotation: np.ndarray
    gripper: np.ndarray
    joints_rad: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        steps, joints = np.shape(self.position_m)[:-1], np.shape(self.joints_rad)[-1:]
        if not joints or joints[0] > STATE_JOINTS:
            raise ValueError(f"joints_rad: expected up to {STATE_JOINTS}, got shape {np.shape(self.joints_rad)}")
        for name, shape in (("position_m", (3,)), ("rotation", (3, 3)), ("gripper", (1,)), ("joints_rad", joints)):
            object.__setattr__(self, name, _checked(name, getattr(self, name), steps, shape))
        check_rotations(self.rotation)


@dataclass(frozen=True, eq=False)
class MobilePose:
    """Absolute pose of both arms and the waist, and the base's velocity; or a trajectory of them.

    waist: (..., 1), robot units. base_velocity: (..., 3), robot units: in a target what the base shall drive at. Either
    may be given once for all T. Raises ValueError for parts that differ in length.
    """

    left: MobileArm
    right: MobileArm
    waist: np.ndarray = field(default_factory=lambda: np.zeros(1))
    base_velocity: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def __post_init__(self) -> None:
        steps = self.left.position_m.shape[:-1]
        if self.right.position_m.shape[:-1] != steps:
            raise ValueError(
                f"right: expected as many poses as left, positions {self.left.position_m.shape}, got "
                f"{self.right.position_m.shape}"
            )
        for name, width in (("waist", 1), ("base_velocity", 3)):
            object.__setattr__(self, name, _checked(name, getattr(self, name), steps, (width,)))

    def state(self) -> np.ndarray:
        """The proprio state of one pose: joints and grippers, the other columns zero. Returns (1, 60) float32.

        Raises ValueError for a trajectory.
        """
        check_single("pose", self.left.position_m)
        state = np.zeros((1, MOBILE_COLUMNS), dtype=np.float32)
        # The same in both layouts.
        for place, arm in ((MOBILE.left, self.left), (MOBILE.right, self.right)):
            state[0, place.state_joints][: len(arm.joints_rad)] = arm.joints_rad
            state[0, place.state_gripper] = arm.gripper[0]
        return state


def anchor(targets: MobilePose, origin: MobilePose, columns: Columns) -> np.ndarray:
    """Absolute targets of T steps as actions anchored at the origin. Returns (T, 60) float64, reserved columns 0.

    Position `R0^T (p - p0)`, rotation `Log(R0^T R)`, grippers and waist as the columns say, the base's velocity as it
    is. Raises ValueError unless targets is a trajectory and origin a single pose.
    """
    check_single("origin", origin.left.position_m)
    actions = np.zeros((count_targets(targets.left.position_m), MOBILE_COLUMNS))
    for place, arm, start in _arms(columns, targets, origin):
        # Row vectors: (R0^T d)^T = d^T R0.
        actions[:, place.position] = (arm.position_m - start.position_m) @ start.rotation
        actions[:, place.rotation] = rotation_log(np.swapaxes(start.rotation, -1, -2) @ arm.rotation)
        subtracted = 0.0 if columns.gripper_is_absolute else start.gripper[0]
        actions[:, place.gripper] = arm.gripper[:, 0] - subtracted
    if columns.waist is not None:
        actions[:, columns.waist] = targets.waist[:, 0] - origin.waist[0]
    if columns.base_velocity is not None:
        actions[:, columns.base_velocity] = targets.base_velocity
    return actions


def recover(actions: np.ndarray, origin: MobilePose, columns: Columns) -> MobilePose:
    """The inverse of anchor: absolute targets from actions (T, 60) in robot units and their observation's pose.

    A waist or base that the columns do not have stays where it is, or stands. Raises ValueError for another shape,
    values that are not finite, or an origin that is not a single pose.
    """
    check_single("origin", origin.left.position_m)
    actions = checked_actions(actions, MOBILE_COLUMNS)
    left, right = (
        MobileArm(
            position_m=start.position_m + actions[:, place.position] @ np.swapaxes(start.rotation, -1, -2),
            rotation=start.rotation @ rotation_exp(actions[:, place.rotation]),
            gripper=actions[:, place.gripper, None] + (0.0 if columns.gripper_is_absolute else start.gripper),
        )
        for place, _, start in _arms(columns, origin, origin)
    )
    waist = np.broadcast_to(origin.waist, (len(actions), 1))
    if columns.waist is not None:
        waist = origin.waist + actions[:, columns.waist, None]
    velocity = np.zeros(3) if columns.base_velocity is None else actions[:, columns.base_velocity]
    return MobilePose(left, right, waist, velocity)


END_EFFECTOR_FRAMES = {
    "simulation": np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]]),
    "piper_x": np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
    "piper": np.array([[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]]),
    "arx_x5": np.array([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]),
}
"""Of RoboDojo's robots: what turns an end effector's rotation as the robot reports it into the model's."""


def to_model_frame(rotation: np.ndarray, robot: str) -> np.ndarray:
    """(..., 3, 3) as a RoboDojo robot reports it -> as MobileArm takes it: `R P`. robot: of END_EFFECTOR_FRAMES."""
    turned: np.ndarray = rotation @ END_EFFECTOR_FRAMES[robot]
    return turned


def from_model_frame(rotation: np.ndarray, robot: str) -> np.ndarray:
    """The inverse of to_model_frame: of a target, for the robot."""
    turned: np.ndarray = rotation @ END_EFFECTOR_FRAMES[robot].T
    return turned


def _arms(columns: Columns, pose: MobilePose, origin: MobilePose) -> Iterator[tuple[ArmPlace, MobileArm, MobileArm]]:
    yield columns.left, pose.left, origin.left
    yield columns.right, pose.right, origin.right


def _checked(name: str, value: np.ndarray, steps: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape == shape and name in _CONSTANT:
        array = np.broadcast_to(array, steps + shape)
    return checked_part(name, array, steps, shape)


# What may be given once for a whole trajectory.
_CONSTANT = ("joints_rad", "waist", "base_velocity")
