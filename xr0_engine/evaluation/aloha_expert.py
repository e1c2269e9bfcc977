"""A scripted policy that hands the cube over, by looking into the simulation: it plans anew at every call.

It goes by the waypoints of training/data/expert.py. Unlike there, a plan begins where the arms and the cube are at the
call, and is one chunk long. Of what is executed while it is computed it knows the prefix alone, which it acts out on a
copy of the simulation: delay costs it what it costs any policy, and a prefix helps it as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.robot.decode import BIMANUAL_COLUMNS, ArmPose, BimanualPose, anchor, recover, rotation_exp, rotation_log
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, ROBOT_TYPE, AlohaEnv
from xr0_engine.training.data.expert import (
    APPROACH_M,
    ARM_JOINTS,
    ARMS,
    CLOSED,
    CUBE,
    GRASP_HEIGHT_M,
    HOVER_M,
    MEETING_M,
    OPEN,
    PICK_TILT_RAD,
    RETREAT_M,
    GripperPose,
    Kinematics,
    Unreachable,
)
from xr0_engine.types import ActionChunk, Observation, RobotInfo

CHUNK_LENGTH = 30

# How fast a move is at its fastest: joints as fast as the servos (drive/aloha.py).
SPEED_M_S = 0.6
SPEED_RAD_S = 3.0
# A minimum-jerk move is so much faster in its middle than on average.
PEAK_OVER_MEAN = 1.875
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

Targets = dict[str, tuple[GripperPose, float]]


@dataclass(frozen=True)
class Stage:
    """One move of both arms, from rest to rest. targets: per arm where to, and the gripper from the first tick on.
    straight: the arms whose grasp point moves on a straight line; the other's joints do."""

    targets: Targets
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
                own = _arm(row, arm)
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
        if _arm(self.joints, arm)[ARM_JOINTS] > GRIPPING or np.linalg.norm(self.cube_m - grasp_m) > HELD_M:
            return False
        pairs = self._data.contact.geom[: self._data.ncon]
        # One finger is enough: in a fast move the other may lose touch for a moment.
        return bool(np.isin(pairs[(pairs == self._cube).any(axis=1)], self._fingers[arm]).any())


class TransferExpert:
    """Plans `length` actions from what the simulation is at the call. env: the one that it looks into.

    A prefix is honoured: its actions come back as they are, and the plan goes on from their last one. If a pose cannot
    be reached the arms stay where they are.
    """

    def __init__(self, env: AlohaEnv, length: int = CHUNK_LENGTH) -> None:
        self._env, self._length = env, length
        self._kinematics, self._ahead = Kinematics(env), Ahead(env)

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return RobotInfo(
            chunk_length=self._length,
            control_rate_hz=CONTROL_RATE_HZ,
            replan_every=None,
            views=tuple(CAMERAS),
            layout=BIMANUAL.name,
            action_width=BIMANUAL_COLUMNS,
            max_prefix=self._length - 1,
        )

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        """prefix: (P, 32) float32, as in executor.Policy. Raises ValueError if it leaves nothing to plan."""
        origin = self._env.pose
        given = np.zeros((0, BIMANUAL_COLUMNS), np.float32) if prefix is None else np.asarray(prefix, np.float32)
        if len(given) >= self._length:
            raise ValueError(f"prefix: expected fewer than {self._length} actions, the chunk's, got {len(given)}")
        targets = _joints(recover(given, origin))
        self._ahead.act(targets)
        rows = self._rows(targets[-1] if len(targets) else self._ahead.joints, self._length - len(given))
        actions = np.concatenate([given, anchor(self._poses(rows), origin).astype(np.float32)])
        active = np.isin(np.arange(BIMANUAL_COLUMNS), BIMANUAL.active_columns or ())
        return ActionChunk(actions, np.zeros_like(actions), active, ROBOT_TYPE, len(given), observation.timestamp_s)

    def _rows(self, begin: np.ndarray, count: int) -> np.ndarray:
        """(count, 14) joint targets after `begin`, in the order of sim.JOINT_NAMES."""
        rows = [begin[None]]
        try:
            for stage in self._stages():
                rows.append(self._move(stage, rows[-1][-1]))
                if sum(map(len, rows)) > count:
                    break
        except Unreachable:
            pass
        plan = np.concatenate(rows)
        plan = np.concatenate([plan, np.repeat(plan[-1:], count, axis=0)])
        return plan[1 : count + 1]

    def _stages(self) -> Iterator[Stage]:
        """What is left to do."""
        cube_m, joints = self._ahead.cube_m, self._ahead.joints
        tilted = np.diag([-1.0, -1.0, 1.0]) @ rotation_exp(np.array([0, PICK_TILT_RAD, 0]))
        level = rotation_exp(np.array([np.pi / 2, 0, 0]))
        grasp_m = np.array([cube_m[0], cube_m[1], GRASP_HEIGHT_M])
        hover, grasp = GripperPose(grasp_m + np.array([0, 0, HOVER_M]), tilted), GripperPose(grasp_m, tilted)
        left, right = GripperPose(MEETING_M, level), GripperPose(MEETING_M, tilted)
        before = GripperPose(MEETING_M - np.array([APPROACH_M, 0, 0]), level)
        away = GripperPose(MEETING_M - RETREAT_M * tilted[:, 0], tilted)

        at = {arm: self._kinematics.forward(arm, _arm(joints, arm)[:ARM_JOINTS]).position_m for arm in ARMS}
        held = {arm: self._ahead.holds(arm, at[arm]) for arm in ARMS}
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
        starts = {arm: self._kinematics.forward(arm, _arm(begin, arm)[:ARM_JOINTS]) for arm in ARMS}
        ends, seconds = {}, stage.least_s
        for arm in ARMS:
            pose, joints = stage.targets[arm][0], _arm(begin, arm)[:ARM_JOINTS]
            turn = rotation_log(starts[arm].rotation.T @ pose.rotation)
            if arm in stage.straight:
                distance_m = float(np.linalg.norm(pose.position_m - starts[arm].position_m))
                least_s = max(distance_m / SPEED_M_S, float(np.linalg.norm(turn)) / SPEED_RAD_S)
            else:
                ends[arm] = self._kinematics.inverse(arm, pose, joints)
                least_s = float(np.abs(ends[arm] - joints).max()) / SPEED_RAD_S
            seconds = max(seconds, PEAK_OVER_MEAN * least_s)
        ticks = round(seconds * CONTROL_RATE_HZ)
        time = np.arange(1, ticks + 1) / ticks
        progress = time**3 * (10 - 15 * time + 6 * time**2)
        arms = []
        for arm in ARMS:
            pose, gripper = stage.targets[arm]
            joints = _arm(begin, arm)[:ARM_JOINTS]
            if arm in ends:
                path = joints + progress[:, None] * (ends[arm] - joints)
            else:
                path = self._line(arm, joints, starts[arm], pose, progress)
            arms.append(np.column_stack([path, np.full(ticks, gripper)]))
        return np.concatenate(arms, axis=1)

    def _line(
        self, arm: str, joints: np.ndarray, start: GripperPose, end: GripperPose, progress: np.ndarray
    ) -> np.ndarray:
        """(ticks, 6) joints along a straight line of the grasp point."""
        turn, rows = rotation_log(start.rotation.T @ end.rotation), []
        for s in progress:
            position_m = (1 - s) * start.position_m + s * end.position_m
            joints = self._kinematics.inverse(
                arm, GripperPose(position_m, start.rotation @ rotation_exp(s * turn)), joints
            )
            rows.append(joints)
        return np.stack(rows)

    def _poses(self, rows: np.ndarray) -> BimanualPose:
        """(T, 14) joint targets as poses of both arms."""
        arms = []
        for arm in ARMS:
            own = np.stack([_arm(row, arm) for row in rows])
            reached = [self._kinematics.forward(arm, row[:ARM_JOINTS]) for row in own]
            position_m = np.stack([pose.position_m for pose in reached])
            rotation = np.stack([pose.rotation for pose in reached])
            arms.append(ArmPose(position_m, rotation, own[:, :ARM_JOINTS], own[:, ARM_JOINTS:]))
        return BimanualPose(*arms)


def _arm(joints: np.ndarray, arm: str) -> np.ndarray:
    """One arm's seven of (14,) values: six joints and the gripper."""
    begin = (ARM_JOINTS + 1) * ARMS.index(arm)
    return joints[begin : begin + ARM_JOINTS + 1]


def _joints(poses: BimanualPose) -> np.ndarray:
    """(T, 14) joints and grippers of poses, in the order of sim.JOINT_NAMES."""
    return np.concatenate(
        [poses.left.joints_rad, poses.left.gripper, poses.right.joints_rad, poses.right.gripper], axis=1
    )
