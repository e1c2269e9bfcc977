"""A scripted expert for the ALOHA transfer-cube simulation: waypoints, inverse kinematics, joint targets.

It reads the cube's pose from the simulator, which a policy does not see. Frame: the simulator's world, metres. A
gripper's x axis points from the wrist to the finger tips, its fingers close along its y axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.robot.decode import rotation_exp, rotation_log
from xr0_engine.sim import CONTROL_RATE_HZ, GRASP_POINT_M, GRIPPER_BODY, AlohaEnv

ARMS = ("left", "right")
ARM_JOINTS = 6
CUBE = "red_box"
OPEN, CLOSED = 1.0, 0.0

# The right gripper comes from above, tilted; its fingers close along two sides of the cube.
PICK_TILT_RAD = np.pi / 3
HOVER_M = 0.09
# Half the cube's side: its centre as it lies on the table.
GRASP_HEIGHT_M = 0.02
# Where the cube changes hands. The left gripper comes from the other side, its fingers above and below the cube.
MEETING_M = np.array([0.0, 0.5, 0.22])
APPROACH_M = 0.10
RETREAT_M = 0.12

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


@dataclass(frozen=True, eq=False)
class Move:
    """One move of an arm, starting and ending at rest.

    gripper: its target from the first tick on, 0 closed to 1 open. straight: the grasp point moves on a straight line;
    otherwise the joints do, which no singular pose on the way can stop.
    """

    seconds: float
    pose: GripperPose
    gripper: float
    straight: bool = True


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


def plan_transfer(env: AlohaEnv) -> np.ndarray:
    """Targets that hand the cube from the right arm to the left, from where everything is now.

    Returns (ticks, 14) float64 for AlohaEnv.step: absolute, in the order of sim.JOINT_NAMES. Raises Unreachable.
    """
    kinematics = Kinematics(env)
    paths = {"left": _left_path(), "right": _right_path(env.physics.named.data.xpos["box"])}
    arms = [
        _follow(kinematics, arm, env.joints[7 * index : 7 * index + ARM_JOINTS], paths[arm])
        for index, arm in enumerate(ARMS)
    ]
    return np.concatenate(arms, axis=1)


def transferred(env: AlohaEnv) -> bool:
    """Whether the left arm has the cube: the simulation's highest reward, and the right arm has let go."""
    physics = env.physics
    touching = {
        frozenset((physics.model.id2name(contact.geom1, "geom"), physics.model.id2name(contact.geom2, "geom")))
        for contact in physics.data.contact[: physics.data.ncon]
    }
    held_right = any(CUBE in pair and any(name.startswith("vx300s_right/") for name in pair) for pair in touching)
    return bool(env.task.get_reward(physics) == env.task.max_reward and not held_right)


def down_to_pick() -> np.ndarray:
    """(3, 3) how the right gripper picks: facing the other arm, then tilted down about its own y axis."""
    return np.diag([-1.0, -1.0, 1.0]) @ rotation_exp(np.array([0, PICK_TILT_RAD, 0]))


def before_meeting() -> GripperPose:
    """Where the left gripper waits for the cube, rolled by a quarter turn."""
    return GripperPose(MEETING_M - [APPROACH_M, 0, 0], rotation_exp(np.array([np.pi / 2, 0, 0])))


def _right_path(cube_m: np.ndarray) -> list[Move]:
    tilted = down_to_pick()
    grasp_m = np.array([cube_m[0], cube_m[1], GRASP_HEIGHT_M])
    hover, grasp = GripperPose(grasp_m + np.array([0, 0, HOVER_M]), tilted), GripperPose(grasp_m, tilted)
    meeting = GripperPose(MEETING_M, tilted)
    # Back along the fingers, so that they do not push the cube.
    retreat = GripperPose(MEETING_M - RETREAT_M * tilted[:, 0], tilted)
    return [
        Move(1.2, hover, OPEN, straight=False),
        Move(0.6, grasp, OPEN),
        Move(0.4, grasp, CLOSED),
        Move(1.4, meeting, CLOSED),
        Move(1.0, meeting, CLOSED),
        Move(0.3, meeting, OPEN),
        Move(0.8, retreat, OPEN),
    ]


def _left_path() -> list[Move]:
    # As long in all as the right arm's path.
    before = before_meeting()
    meeting = GripperPose(MEETING_M, before.rotation)
    return [
        Move(2.4, before, OPEN, straight=False),
        Move(1.0, before, OPEN),
        Move(0.8, meeting, OPEN),
        Move(0.4, meeting, CLOSED),
        Move(1.1, meeting, CLOSED),
    ]


def _follow(kinematics: Kinematics, arm: str, joints: np.ndarray, path: list[Move]) -> np.ndarray:
    """(ticks, 7) targets of one arm along its path."""
    pose, rows = kinematics.forward(arm, joints), []
    for move in path:
        ticks = round(move.seconds * CONTROL_RATE_HZ)
        # Minimum jerk from 0 to 1.
        time = np.arange(1, ticks + 1)[:, None] / ticks
        progress = time**3 * (10 - 15 * time + 6 * time**2)
        if move.straight:
            turn = rotation_log(pose.rotation.T @ move.pose.rotation)
            for s in progress:
                position_m = (1 - s) * pose.position_m + s * move.pose.position_m
                on_the_way = GripperPose(position_m, pose.rotation @ rotation_exp(s * turn))
                joints = kinematics.inverse(arm, on_the_way, joints)
                rows.append(np.append(joints, move.gripper))
        else:
            end = kinematics.inverse(arm, move.pose, joints)
            rows.extend(np.append(row, move.gripper) for row in (1 - progress) * joints + progress * end)
            joints = end
        pose = move.pose
    return np.stack(rows)
