"""Faults of a robot's cameras, sensors and orders, put on to the ALOHA simulation from a moment on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from xr0_engine.executor import Robot, Snapshot
from xr0_engine.robot.decode import ArmPose, BimanualPose
from xr0_engine.sim import CONTROL_RATE_HZ, AlohaEnv, columns_to_joints, joints_to_columns

OTHER_CAMERA = "left_wrist"
RIGHT_WAIST, GRIPPERS = 7, [6, 13]
"""Of the simulator's 14 joints."""
KNOCKED = 0.1
"""Of a picture's width: how far a camera that was knocked sees to the side."""
OFFSET_RAD, SPIKE_RAD = 0.2, 0.5
AWAY_M = 3.0


@dataclass(eq=False)
class Scene:
    """What a fault may look at. env: the simulation; first: the first snapshot of the fault's time; number: how many of
    its snapshots came before this one."""

    env: AlohaEnv
    first: Snapshot
    number: int


Fault = Callable[[Snapshot, Scene], Snapshot]
"""The snapshot that the executor is given instead."""


def _pictures(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def fault(snapshot: Snapshot, scene: Scene) -> Snapshot:
        images = {view: change(image) for view, image in snapshot.observation.images.items()}
        return replace(snapshot, observation=replace(snapshot.observation, images=images))

    return fault


def _joints(change: Callable[[np.ndarray, Scene], np.ndarray]) -> Fault:
    """change: (14,) joints and grippers -> those that the sensors tell, of state and pose alike."""

    def fault(snapshot: Snapshot, scene: Scene) -> Snapshot:
        joints = change(columns_to_joints(snapshot.observation.state[-1]).astype(np.float64), scene)
        pose = snapshot.origin
        assert isinstance(pose, BimanualPose)
        told = BimanualPose(
            *(_arm(arm, own) for arm, own in zip((pose.left, pose.right), np.split(joints, 2), strict=True))
        )
        observation = replace(snapshot.observation, state=joints_to_columns(joints)[None])
        return Snapshot(observation, told)

    return fault


def _arm(arm: ArmPose, joints: np.ndarray) -> ArmPose:
    return replace(arm, joints_rad=joints[:6], gripper=joints[6:])


def _frozen_camera(snapshot: Snapshot, scene: Scene) -> Snapshot:
    return replace(snapshot, observation=replace(snapshot.observation, images=scene.first.observation.images))


def _other_camera(snapshot: Snapshot, scene: Scene) -> Snapshot:
    env = scene.env
    seen = env.physics.render(height=env.height, width=env.width, camera_id=OTHER_CAMERA)
    images = dict.fromkeys(snapshot.observation.images, seen)
    return replace(snapshot, observation=replace(snapshot.observation, images=images))


def _no_cube(snapshot: Snapshot, scene: Scene) -> Snapshot:
    """The picture of a table without the cube; the world stays as it is."""
    physics = scene.env.physics
    data = physics.data
    kept = data.qpos.copy(), data.qacc_warmstart.copy()
    data.qpos[-7] += AWAY_M
    physics.forward()
    images = {view: image.copy() for view, image in scene.env.observe().images.items()}
    data.qpos[:] = kept[0]
    physics.forward()
    data.qacc_warmstart[:] = kept[1]
    return replace(snapshot, observation=replace(snapshot.observation, images=images))


def _frozen_state(snapshot: Snapshot, scene: Scene) -> Snapshot:
    observation = replace(snapshot.observation, state=scene.first.observation.state)
    return Snapshot(observation, scene.first.origin)


def _told(instruction: str) -> Fault:
    return lambda snapshot, scene: replace(snapshot, observation=replace(snapshot.observation, instruction=instruction))


def _moved(joint: int, by: float, only_first: bool = False) -> Fault:
    def change(joints: np.ndarray, scene: Scene) -> np.ndarray:
        joints[joint] += by * (scene.number == 0 or not only_first)
        return joints

    return _joints(change)


def _grippers(change: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def changed(joints: np.ndarray, scene: Scene) -> np.ndarray:
        joints[GRIPPERS] = change(joints[GRIPPERS])
        return joints

    return _joints(changed)


def _shifted(image: np.ndarray) -> np.ndarray:
    by = round(KNOCKED * image.shape[1])
    return np.concatenate([image[:, by:], np.repeat(image[:, -1:], by, axis=1)], axis=1)


FAULTS: dict[str, Fault] = {
    "camera frozen": _frozen_camera,
    "camera black": _pictures(np.zeros_like),
    "camera overexposed": _pictures(lambda image: np.clip(image * 1.6 + 40.0, 0, 255).astype(np.uint8)),
    "camera turned by 180 degrees": _pictures(lambda image: image[::-1, ::-1]),
    "camera mirrored": _pictures(lambda image: image[:, ::-1]),
    "red and blue exchanged": _pictures(lambda image: image[..., ::-1]),
    "camera knocked, 10 % of its width": _pictures(_shifted),
    "another camera in its place": _other_camera,
    "cube taken away": _no_cube,
    "right waist off by 0.2 rad": _moved(RIGHT_WAIST, OFFSET_RAD),
    "right waist, one spike of 0.5 rad": _moved(RIGHT_WAIST, SPIKE_RAD, only_first=True),
    "state frozen": _frozen_state,
    "grippers in percent": _grippers(lambda grippers: grippers * 100),
    "grippers the wrong way round": _grippers(lambda grippers: 1 - grippers),
    "another instruction": _told("Open the drawer and put the sponge in."),
}
"""Name -> fault. All but the spike stay."""


class FaultyRobot:
    """A Robot between the executor and a simulated one. begin_step: the control step from which on the fault is there;
    on_observe: called before each look."""

    def __init__(
        self,
        robot: Robot,
        env: AlohaEnv,
        fault: Fault | None,
        begin_s: float,
        on_observe: Callable[[], None] = lambda: None,
    ) -> None:
        self._robot, self._env, self._fault, self._begin_s = robot, env, fault, begin_s
        self._on_observe = on_observe
        self._first: Snapshot | None = None
        self._number = 0

    def observe(self, now_s: float) -> Snapshot:
        snapshot = self._robot.observe(now_s)
        self._on_observe()
        if self._fault is None or now_s < self._begin_s - 0.5 / CONTROL_RATE_HZ:
            return snapshot
        self._first = self._first or snapshot
        changed = self._fault(snapshot, Scene(self._env, self._first, self._number))
        self._number += 1
        return changed

    def command(self, row: np.ndarray) -> None:
        self._robot.command(row)

    def stop(self) -> None:
        self._robot.stop()
