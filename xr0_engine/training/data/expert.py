"""A scripted expert for the ALOHA transfer-cube simulation: from where the arms and the cube are, what is left to do.

It reads the cube's pose from the simulator, which a policy does not see. What it does next shows in where the arms and
the cube are, and in the grippers, never in a clock alone: it does not wait, and between waypoints it is as fast early
on as later. A policy that sees one picture and one pose learns nothing from a pause but to pause.

Frame: the simulator's world, metres. Its axes: kinematics.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.robot.decode import rotation_exp, rotation_log
from xr0_engine.sim import CONTROL_RATE_HZ, AlohaEnv
from xr0_engine.training.data.kinematics import ARM_JOINTS, ARMS, GripperPose, Kinematics, Unreachable

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

# How fast a move is between its ramps: joints half as fast as the servos (drive/aloha.py). A ramp is as short as the
# arms allow without dropping the cube.
SPEED_M_S = 0.3
SPEED_RAD_S = 1.6
RAMP_TICKS = 4
# The shortest move, and what fingers take to close and to open.
SETTLE_S, CLOSE_S, OPEN_S = 0.1, 0.4, 0.3
# A waypoint counts as reached within so much: more than the servos sag, less than a finger's clearance.
REACHED_M = 0.012
# Over the cube: straight down from here.
OVER_M = 0.015
# Of a gripper's range: on the cube it stands at 0.6, above this the fingers are still on their way.
GRIPPING = 0.75
# From the grasp point to the centre of a cube that is held.
HELD_M = 0.025


@dataclass(frozen=True)
class Stage:
    """One move of both arms, from rest to rest. targets: per arm where to, and the gripper from the first tick on.
    straight: the arms whose grasp point moves on a straight line; otherwise the joints do, which no singular pose on
    the way can stop."""

    targets: dict[str, tuple[GripperPose, float]]
    least_s: float = SETTLE_S
    straight: tuple[str, ...] = ARMS


class Ahead:
    """A copy of the simulation, acted out some steps further."""

    def __init__(self, env: AlohaEnv) -> None:
        import mujoco

        self._mujoco: Any = mujoco
        self._env, self._model = env, env.physics.model.ptr
        self._data = mujoco.MjData(self._model)
        self._cube = env.physics.model.name2id(CUBE, "geom")
        self._body = env.physics.model.name2id("box", "body")
        names = [f"vx300s_{{}}/10_{side}_gripper_finger" for side in ("left", "right")]
        self._fingers = {arm: [env.physics.model.name2id(name.format(arm), "geom") for name in names] for arm in ARMS}
        self._ticks = round(1 / CONTROL_RATE_HZ / self._model.opt.timestep)

    def act(self, targets: np.ndarray) -> None:
        """From what the simulation is now, hold each of (P, 14) targets for a control step."""
        from gym_aloha.constants import unnormalize_puppet_gripper_position

        self._mujoco.mj_copyData(self._data, self._model, self._env.physics.data.ptr)
        for row in np.clip(targets, *self._env.limits.T):
            for index, arm in enumerate(ARMS):
                own = of_arm(row, arm)
                finger_m = unnormalize_puppet_gripper_position(own[ARM_JOINTS])
                self._data.ctrl[8 * index : 8 * index + 8] = [*own[:ARM_JOINTS], finger_m, -finger_m]
            self._mujoco.mj_step(self._model, self._data, self._ticks)
        self._mujoco.mj_forward(self._model, self._data)

    @property
    def joints(self) -> np.ndarray:
        """(14,) as AlohaEnv.joints."""
        from gym_aloha.constants import normalize_puppet_gripper_position

        arms = [self._data.qpos[8 * index : 8 * index + 7].copy() for index in range(len(ARMS))]
        for arm in arms:
            arm[ARM_JOINTS] = normalize_puppet_gripper_position(arm[ARM_JOINTS])
        return np.concatenate(arms)

    @property
    def cube_m(self) -> np.ndarray:
        """(3,) where the cube is."""
        position_m: np.ndarray = self._data.xpos[self._body].copy()
        return position_m

    def holds(self, arm: str, grasp_m: np.ndarray) -> bool:
        """Whether an arm, its grasp point at (3,) grasp_m, has the cube between its fingers."""
        if of_arm(self.joints, arm)[ARM_JOINTS] > GRIPPING or np.linalg.norm(self.cube_m - grasp_m) > HELD_M:
            return False
        pairs = self._data.contact.geom[: self._data.ncon]
        # One finger is enough: in a fast move the other may lose touch for a moment.
        return bool(np.isin(pairs[(pairs == self._cube).any(axis=1)], self._fingers[arm]).any())


class TransferPlanner:
    """Joint targets that hand the cube from the right arm to the left. env: the simulation that it looks into."""

    def __init__(self, env: AlohaEnv) -> None:
        self.kinematics, self.ahead = Kinematics(env), Ahead(env)

    def plan(self, prefix: np.ndarray) -> Iterator[np.ndarray]:
        """(ticks, 14) targets of one move after another, from what the simulation is at the first one, once (P, 14)
        prefix is acted out. In the order of sim.JOINT_NAMES. Raises Unreachable."""
        self.ahead.act(prefix)
        begin = prefix[-1] if len(prefix) else self.ahead.joints
        for stage in self._stages():
            rows = self._move(stage, begin)
            begin = rows[-1]
            yield rows

    def _stages(self) -> Iterator[Stage]:
        """What is left to do."""
        cube_m, joints = self.ahead.cube_m, self.ahead.joints
        tilted, level = down_to_pick(), before_meeting().rotation
        grasp_m = np.array([cube_m[0], cube_m[1], GRASP_HEIGHT_M])
        hover, grasp = GripperPose(grasp_m + np.array([0, 0, HOVER_M]), tilted), GripperPose(grasp_m, tilted)
        before, left, right = before_meeting(), GripperPose(MEETING_M, level), GripperPose(MEETING_M, tilted)
        # Back along the fingers, so that they do not push the cube.
        away = GripperPose(MEETING_M - RETREAT_M * tilted[:, 0], tilted)

        at = {arm: self.kinematics.forward(arm, of_arm(joints, arm)[:ARM_JOINTS]).position_m for arm in ARMS}
        held = {arm: self.ahead.holds(arm, at[arm]) for arm in ARMS}
        right_m = at["right"]
        if not any(held.values()):
            over = np.linalg.norm(right_m[:2] - grasp_m[:2]) < OVER_M and right_m[2] < HOVER_M + GRASP_HEIGHT_M + OVER_M
            if not over:
                yield Stage({"left": (before, OPEN), "right": (hover, OPEN)}, straight=())
            if np.linalg.norm(right_m - grasp_m) > REACHED_M:
                yield Stage({"left": (before, OPEN), "right": (grasp, OPEN)}, straight=("right",))
            yield Stage({"left": (before, OPEN), "right": (grasp, CLOSED)}, CLOSE_S, straight=("right",))
        if not held["left"]:
            if np.linalg.norm(right_m - MEETING_M) > REACHED_M:
                yield Stage({"left": (before, OPEN), "right": (right, CLOSED)}, straight=("right",))
            yield Stage({"left": (left, OPEN), "right": (right, CLOSED)})
            yield Stage({"left": (left, CLOSED), "right": (right, CLOSED)}, CLOSE_S)
        if held["right"] or not held["left"]:
            yield Stage({"left": (left, CLOSED), "right": (right, OPEN)}, OPEN_S)
        yield Stage({"left": (left, CLOSED), "right": (away, OPEN)})

    def _move(self, stage: Stage, begin: np.ndarray) -> np.ndarray:
        """(ticks, 14) targets of one stage, both arms in the same time."""
        ends, seconds = {}, 0.0
        for arm in ARMS:
            pose, joints = stage.targets[arm][0], of_arm(begin, arm)[:ARM_JOINTS]
            if arm in stage.straight:
                start = self.kinematics.forward(arm, joints)
                turn = rotation_log(start.rotation.T @ pose.rotation)
                distance_m = float(np.linalg.norm(pose.position_m - start.position_m))
                seconds = max(seconds, distance_m / SPEED_M_S, float(np.linalg.norm(turn)) / SPEED_RAD_S)
            else:
                ends[arm] = self.kinematics.inverse(arm, pose, joints)
                seconds = max(seconds, float(np.abs(ends[arm] - joints).max()) / SPEED_RAD_S)
        progress = _progress(seconds, stage.least_s)
        arms = []
        for arm in ARMS:
            pose, gripper = stage.targets[arm]
            joints = of_arm(begin, arm)[:ARM_JOINTS]
            path = None if arm in ends else self._line(arm, joints, pose, progress)
            if path is None:
                end = ends[arm] if arm in ends else self.kinematics.inverse(arm, pose, joints)
                path = joints + progress[:, None] * (end - joints)
            arms.append(np.column_stack([path, np.full(len(progress), gripper)]))
        return np.concatenate(arms, axis=1)

    def _line(self, arm: str, joints: np.ndarray, pose: GripperPose, progress: np.ndarray) -> np.ndarray | None:
        """(ticks, 6) along a straight line; None where a singular pose is in the way, as near the meeting place."""
        try:
            return self.kinematics.line(arm, joints, pose, progress)
        except Unreachable:
            return None


def plan_transfer(env: AlohaEnv) -> np.ndarray:
    """Targets that hand the cube from the right arm to the left, from where everything is now.

    Returns (ticks, 14) float64 for AlohaEnv.step: absolute, in the order of sim.JOINT_NAMES. Raises Unreachable.
    """
    return np.concatenate(list(TransferPlanner(env).plan(np.empty((0, 2 * (ARM_JOINTS + 1))))))


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


def of_arm(joints: np.ndarray, arm: str) -> np.ndarray:
    """One arm's seven of (14,) values: six joints and the gripper."""
    begin = (ARM_JOINTS + 1) * ARMS.index(arm)
    return joints[begin : begin + ARM_JOINTS + 1]


def _progress(seconds: float, least_s: float) -> np.ndarray:
    """(ticks,) from 0, left out, to 1, at one speed between two ramps. seconds: what the way takes at that speed."""
    ticks = max(np.ceil(seconds * CONTROL_RATE_HZ) + RAMP_TICKS - 1, round(least_s * CONTROL_RATE_HZ))
    speed = np.minimum(np.arange(1, ticks + 1), RAMP_TICKS)
    speed = np.minimum(speed, speed[::-1])
    return np.cumsum(speed) / speed.sum()
