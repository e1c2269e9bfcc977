"""A scripted policy that hands the cube over, by looking into the simulation: it plans anew at every call.

It goes by training/data/expert.py, one chunk at a time. Of what is executed while a chunk is computed it knows the
prefix alone, which it acts out on a copy of the simulation: delay costs it what it costs any policy, and a prefix helps
it as one.
"""

from __future__ import annotations

import numpy as np

from xr0_engine.robot.decode import BIMANUAL_COLUMNS, ArmPose, BimanualPose, anchor, recover
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, ROBOT_TYPE, AlohaEnv
from xr0_engine.training.data.expert import TransferPlanner, of_arm
from xr0_engine.training.data.kinematics import ARM_JOINTS, ARMS, Unreachable
from xr0_engine.types import ActionChunk, Observation, RobotInfo

CHUNK_LENGTH = 30


class TransferExpert:
    """Plans `length` actions from what the simulation is at the call. env: the one that it looks into.

    A prefix is honoured: its actions come back as they are, and the plan goes on from their last one. If a pose cannot
    be reached the arms stay where they are.
    """

    def __init__(self, env: AlohaEnv, length: int = CHUNK_LENGTH) -> None:
        self._env, self._length, self._planner = env, length, TransferPlanner(env)

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
        rows = self._rows(_joints(recover(given, origin)), self._length - len(given))
        actions = np.concatenate([given, anchor(self._poses(rows), origin).astype(np.float32)])
        active = np.isin(np.arange(BIMANUAL_COLUMNS), BIMANUAL.active_columns or ())
        return ActionChunk(actions, np.zeros_like(actions), active, ROBOT_TYPE, len(given), observation.timestamp_s)

    def _rows(self, prefix: np.ndarray, count: int) -> np.ndarray:
        """(count, 14) joint targets after (P, 14) prefix, in the order of sim.JOINT_NAMES."""
        plan = prefix[-1:] if len(prefix) else self._env.joints[None]
        try:
            for rows in self._planner.plan(prefix):
                plan = np.concatenate([plan, rows])
                if len(plan) > count:
                    break
        except Unreachable:
            pass
        return np.concatenate([plan, np.repeat(plan[-1:], count, axis=0)])[1 : count + 1]

    def _poses(self, rows: np.ndarray) -> BimanualPose:
        """(T, 14) joint targets as poses of both arms."""
        arms = []
        for arm in ARMS:
            own = np.stack([of_arm(row, arm) for row in rows])
            reached = [self._planner.kinematics.forward(arm, row[:ARM_JOINTS]) for row in own]
            position_m = np.stack([pose.position_m for pose in reached])
            rotation = np.stack([pose.rotation for pose in reached])
            arms.append(ArmPose(position_m, rotation, own[:, :ARM_JOINTS], own[:, ARM_JOINTS:]))
        return BimanualPose(*arms)


def _joints(poses: BimanualPose) -> np.ndarray:
    """(T, 14) joints and grippers of poses, in the order of sim.JOINT_NAMES."""
    return np.concatenate(
        [poses.left.joints_rad, poses.left.gripper, poses.right.joints_rad, poses.right.gripper], axis=1
    )
