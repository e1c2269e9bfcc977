"""A scripted policy for the ALOHA simulation: what a trained one is like to an executor, without its weights."""

from __future__ import annotations

import numpy as np

from xr0_engine.decode import BIMANUAL_COLUMNS
from xr0_engine.sim import CONTROL_RATE_HZ, joints_to_columns
from xr0_engine.types import ActionChunk, Observation

CHUNK_LENGTH = 30
# One swing of a joint takes a second or two, up to a third of a radian far.
SPEED_HZ = (0.2, 0.5)
REACH_RAD = 0.3
# How fast a chunk forgets the motion that its prefix ends with.
BLEND_STEPS = 6.0
JOINTS = joints_to_columns(np.tile([1.0] * 6 + [0.0], 2)) > 0


class WanderPolicy:
    """Smooth joint motions from where the robot is, others in every call, as samples of an undecided model are.

    With a prefix a chunk goes on from the prefix's last position and speed, and turns to its own motion within some
    steps; without, it starts from rest. Grippers and end effectors stay where they are.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        time_s = np.arange(CHUNK_LENGTH)[:, None] / CONTROL_RATE_HZ
        speed = 2 * np.pi * self._rng.uniform(*SPEED_HZ, BIMANUAL_COLUMNS)
        reach = self._rng.uniform(-REACH_RAD, REACH_RAD, BIMANUAL_COLUMNS) * JOINTS
        path = reach * np.sin(speed * time_s)
        if prefix is not None and len(prefix):
            given = len(prefix)
            after = np.arange(1, CHUNK_LENGTH - given + 1)[:, None]
            own = np.diff(path, axis=0)[given - 1 :]
            before = prefix[-1] - prefix[-2] if given > 1 else np.zeros(BIMANUAL_COLUMNS)
            path[given:] = prefix[-1] + np.cumsum(own + (before - own[0]) * np.exp(-after / BLEND_STEPS), axis=0)
            path[:given] = prefix
        actions = path.astype(np.float32)
        return ActionChunk(
            actions=actions,
            normalized=actions,
            active_columns=JOINTS,
            robot_type=observation.robot_type or "bimanual",
            prefix_length=0 if prefix is None else len(prefix),
            timestamp_s=observation.timestamp_s,
        )
