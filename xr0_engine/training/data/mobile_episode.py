"""Two arms, a waist and a base that drives, in the released file format: what XR-1's episode files hold besides those
of XR-0 (spec section 8). Actions come in the 60 columns of the layout that the profile names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.files import table
from xr0_engine.robot.mobile import MOBILE_COLUMNS, STATE_JOINTS, Columns, MobileArm, MobilePose, anchor

ARM_PARTS = {"position": ("ee_pos", 3), "rotation": ("ee_rotm", 9), "gripper": ("gripper_pos", 1)}
"""Part of an arm that actions have -> its name in the file, and how many numbers a row has."""
JOINTS = "arm_joint"
"""Of the proprios: up to STATE_JOINTS numbers a row."""
BODY = {"waist": ("waist_pos", 1), "base_velocity": ("base_vel", 3)}
DIGITS = 7
"""After the point, of what is written: as in episode.py."""


@dataclass(frozen=True, eq=False)
class MobileMotion:
    """Absolute poses; actions come anchored at the measured pose, but for the base's velocity, which is as it is.

    proprios, targets: N poses each. layout: where parts stand. columns: (60,) bool. Parts that a robot does not report
    stand still in the poses, and are not among the columns.
    """

    proprios: MobilePose
    targets: MobilePose
    layout: Columns
    columns: np.ndarray

    def __len__(self) -> int:
        return len(self.proprios.left.position_m)

    def state(self, tick: int) -> np.ndarray:
        return _take(self.proprios, tick).state()

    def actions(self, tick: int, length: int) -> np.ndarray:
        ticks = np.minimum(np.arange(tick, tick + length), len(self) - 1)
        actions = anchor(_take(self.targets, ticks), _take(self.proprios, tick), self.layout)
        actions[:, ~self.columns] = 0
        return actions


def read_motion(proprios: Mapping[str, Any], actions: Mapping[str, Any], count: int, layout: Columns) -> MobileMotion:
    """Of a file's sections; count: N. A part that a section lacks is not supervised; the measured velocity of the base
    is not needed. Raises ValueError that names what is wrong."""
    columns = np.zeros(MOBILE_COLUMNS, bool)
    for side, place in (("left", layout.left), ("right", layout.right)):
        for part, (name, _) in ARM_PARTS.items():
            columns[getattr(place, part)] = all(f"{side}_{name}" in section for section in (proprios, actions))
    if layout.waist is not None:
        columns[layout.waist] = all(BODY["waist"][0] in section for section in (proprios, actions))
    if layout.base_velocity is not None:
        columns[layout.base_velocity] = BODY["base_velocity"][0] in actions
    if not columns.any():
        raise ValueError("proprios and actions: expected at least one part of the robot in both")
    return MobileMotion(
        _poses(proprios, "proprios", count, True), _poses(actions, "actions", count, False), layout, columns
    )


def sections(motion: MobileMotion) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of read_motion: `proprios` and `actions` of a file."""
    return _written(motion.proprios, motion, True), _written(motion.targets, motion, False)


def _poses(raw: Mapping[str, Any], where: str, count: int, with_joints: bool) -> MobilePose:
    def rows(name: str, widths: range, still: np.ndarray) -> np.ndarray:
        if name not in raw:
            return np.tile(still, (count, 1))
        values = table(raw[name], f"{where}.{name}")
        if len(values) != count or values.shape[1] not in widths:
            most = f"up to {widths[-1]}" if len(widths) > 1 else str(widths[0])
            raise ValueError(f"{where}.{name}: expected shape ({count}, {most}), got {values.shape}")
        return values

    def arm(side: str) -> MobileArm:
        still = {"position": np.zeros(3), "rotation": np.eye(3).ravel(), "gripper": np.zeros(1)}
        parts = {
            part: rows(f"{side}_{name}", range(width, width + 1), still[part])
            for part, (name, width) in ARM_PARTS.items()
        }
        joints = rows(f"{side}_{JOINTS}", range(1, STATE_JOINTS + 1), np.zeros(0)) if with_joints else np.zeros(0)
        return MobileArm(parts["position"], parts["rotation"].reshape(-1, 3, 3), parts["gripper"], joints)

    waist, velocity = (rows(name, range(width, width + 1), np.zeros(width)) for name, width in BODY.values())
    return MobilePose(arm("left"), arm("right"), waist, velocity)


def _written(poses: MobilePose, motion: MobileMotion, with_joints: bool) -> dict[str, Any]:
    told: dict[str, np.ndarray] = {}
    for side, pose, place in (("left", poses.left, motion.layout.left), ("right", poses.right, motion.layout.right)):
        values = {"position": pose.position_m, "rotation": pose.rotation.reshape(-1, 9), "gripper": pose.gripper}
        for part, (name, _) in ARM_PARTS.items():
            if motion.columns[getattr(place, part)].all():
                told[f"{side}_{name}"] = values[part]
        if with_joints and pose.joints_rad.shape[-1]:
            told[f"{side}_{JOINTS}"] = pose.joints_rad
    for part, column in (("waist", motion.layout.waist), ("base_velocity", motion.layout.base_velocity)):
        if column is not None and motion.columns[column].all():
            told[BODY[part][0]] = getattr(poses, part)
    return {name: values.round(DIGITS).tolist() for name, values in told.items()}


def _take(poses: MobilePose, ticks: int | np.ndarray) -> MobilePose:
    """Some poses of a trajectory, or one."""
    left, right = (
        MobileArm(arm.position_m[ticks], arm.rotation[ticks], arm.gripper[ticks], arm.joints_rad[ticks])
        for arm in (poses.left, poses.right)
    )
    return MobilePose(left, right, poses.waist[ticks], poses.base_velocity[ticks])
