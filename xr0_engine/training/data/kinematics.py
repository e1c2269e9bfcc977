"""Forward and inverse kinematics of the ALOHA simulation's two arms, on a copy of its state.

Frame: the simulator's world, metres. A gripper's x axis points from the wrist to the finger tips, its fingers close
along its y axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.robot.decode import rotation_exp, rotation_log
from xr0_engine.sim import GRASP_POINT_M, GRIPPER_BODY, AlohaEnv

ARMS = ("left", "right")
ARM_JOINTS = 6

# Damped least squares: the damping keeps steps finite near singular poses, at some cost in convergence.
IK_DAMPING = 1e-2
IK_ITERATIONS = 200
# Metres and radians: far below what the servos hold.
IK_TOLERANCE = 1e-4
IK_MAX_STEP_RAD = 0.2


class Unreachable(ValueError):
    """A pose for which inverse kinematics finds no joints."""


@dataclass(frozen=True, eq=False)
class GripperPose:
    """Where a gripper's grasp point is. position_m: (3,). rotation: (3, 3), gripper to world."""

    position_m: np.ndarray
    rotation: np.ndarray


class Kinematics:
    """Forward and inverse kinematics of both arms, on a copy of the simulator's state."""

    def __init__(self, env: AlohaEnv) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        self._model = env.physics.model.ptr
        self._data = mujoco.MjData(self._model)
        self._body = {arm: env.physics.model.name2id(GRIPPER_BODY.format(arm), "body") for arm in ARMS}
        # An arm has eight positions and degrees of freedom, its two fingers last.
        self._columns = {arm: slice(8 * index, 8 * index + ARM_JOINTS) for index, arm in enumerate(ARMS)}
        self._limits = {arm: env.limits[7 * index : 7 * index + ARM_JOINTS] for index, arm in enumerate(ARMS)}

    def forward(self, arm: str, joints_rad: np.ndarray) -> GripperPose:
        """The pose of a gripper's grasp point. joints_rad: (6,)."""
        self._data.qpos[self._columns[arm]] = joints_rad
        self._mujoco.mj_kinematics(self._model, self._data)
        rotation = self._data.xmat[self._body[arm]].reshape(3, 3).copy()
        return GripperPose(self._data.xpos[self._body[arm]] + GRASP_POINT_M * rotation[:, 0], rotation)

    def inverse(self, arm: str, pose: GripperPose, start_rad: np.ndarray) -> np.ndarray:
        """Joints (6,) that put the grasp point at a pose, within the limits and near start_rad. Raises Unreachable."""
        joints = start_rad
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(IK_ITERATIONS):
            reached = self.forward(arm, joints)
            # In the world frame: exp(turn) takes the reached rotation to the wanted one.
            turn = rotation_log(pose.rotation @ reached.rotation.T)
            error = np.concatenate([pose.position_m - reached.position_m, turn])
            if np.abs(error).max() < IK_TOLERANCE:
                return joints
            self._mujoco.mj_comPos(self._model, self._data)
            self._mujoco.mj_jac(
                self._model, self._data, jacobian[:3], jacobian[3:], reached.position_m, self._body[arm]
            )
            j = jacobian[:, self._columns[arm]]
            step = j.T @ np.linalg.solve(j @ j.T + IK_DAMPING**2 * np.eye(6), error)
            step *= min(1.0, IK_MAX_STEP_RAD / np.abs(step).max())
            joints = np.clip(joints + step, *self._limits[arm].T)
        raise Unreachable(f"{arm} gripper: no joints found for position {pose.position_m.round(3).tolist()}")

    def line(self, arm: str, start_rad: np.ndarray, end: GripperPose, progress: np.ndarray) -> np.ndarray:
        """Joints (N, 6) along a straight line of the grasp point. progress: (N,), 0 where start_rad is to 1 at `end`.
        Raises Unreachable."""
        start, joints, rows = self.forward(arm, start_rad), start_rad, []
        turn = rotation_log(start.rotation.T @ end.rotation)
        for s in progress:
            position_m = (1 - s) * start.position_m + s * end.position_m
            joints = self.inverse(arm, GripperPose(position_m, start.rotation @ rotation_exp(s * turn)), joints)
            rows.append(joints)
        return np.stack(rows)
