"""How a policy's columns see and move the ALOHA simulation: its joints as they are, or the end effectors, for which
joints are found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from xr0_engine.robot import mobile
from xr0_engine.robot.decode import ArmPose, BimanualPose
from xr0_engine.robot.layouts import BIMANUAL, MOBILE, Layout
from xr0_engine.sim import ROBOT_TYPE, AlohaEnv, columns_to_joints
from xr0_engine.training.data.kinematics import ARM_JOINTS, ARMS, GripperPose, Kinematics, Unreachable
from xr0_engine.types import Observation


class Body(Protocol):
    """Of a simulation that is reset while it is in use. layout: of the rows that move it."""

    layout: Layout

    def observe(self, instruction: str) -> Observation:
        """What the robot sees and feels now; renders every camera."""

    def pose(self) -> BimanualPose | mobile.MobilePose: ...

    def targets(self, row: np.ndarray) -> np.ndarray:
        """(14,) for AlohaEnv.step. row: (A,) float64, an absolute row of the layout."""


class JointBody:
    """XR-0's: joints and grippers count, the columns of the end effectors are not used."""

    layout = BIMANUAL

    def __init__(self, env: AlohaEnv) -> None:
        self._env = env

    def observe(self, instruction: str) -> Observation:
        return self._env.observe(instruction)

    def pose(self) -> BimanualPose:
        return self._env.pose

    def targets(self, row: np.ndarray) -> np.ndarray:
        return columns_to_joints(row)


class EndEffectorBody:
    """XR-1's, whose actions have no joints: both arms stand on a waist and a base that do not move. An arm whose target
    no joints reach stays where it is."""

    layout = MOBILE

    def __init__(self, env: AlohaEnv) -> None:
        self._env, self._kinematics = env, Kinematics(env)

    def observe(self, instruction: str) -> Observation:
        return replace(self._env.observe(instruction), state=self.pose().state(), robot_type=MOBILE.name)

    def pose(self) -> mobile.MobilePose:
        pose = self._env.pose
        return mobile.MobilePose(_arm(pose.left), _arm(pose.right))

    def targets(self, row: np.ndarray) -> np.ndarray:
        assert isinstance(MOBILE.rest, mobile.MobilePose)
        # Rows are anchored at the world's origin.
        wanted = mobile.recover(row[None], MOBILE.rest, mobile.MOBILE)
        joints = np.split(self._env.joints, 2)
        for side, arm, own in zip(ARMS, (wanted.left, wanted.right), joints, strict=True):
            try:
                pose = GripperPose(arm.position_m[0], arm.rotation[0])
                own[:ARM_JOINTS] = self._kinematics.inverse(side, pose, own[:ARM_JOINTS].copy())
            except Unreachable:
                pass
            own[ARM_JOINTS:] = arm.gripper[0]
        return np.concatenate(joints)


BODIES: Mapping[str, type[JointBody | EndEffectorBody]] = {ROBOT_TYPE: JointBody, MOBILE.name: EndEffectorBody}
"""Robot type -> body."""


def _arm(arm: ArmPose) -> mobile.MobileArm:
    return mobile.MobileArm(arm.position_m, arm.rotation, arm.gripper, arm.joints_rad)
