"""A scripted policy for the ALOHA simulation: what a trained one is like to an executor, without its weights."""

from __future__ import annotations

import numpy as np

from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.sim import joints_to_columns
from xr0_engine.types import ActionChunk, Observation

CHUNK_LENGTH = 30
# How far a chunk's goal may lie from the first observation's pose: well within the arms' ranges.
REACH_RAD = 0.3
# How many steps it takes to give up the speed that a prefix ends with.
BLEND_STEPS = 4.0
JOINTS = joints_to_columns(np.tile([1.0] * 6 + [0.0], 2)) > 0


class WanderPolicy:
    """Smooth joint motions from where the robot is to a goal that every call draws anew, as an undecided model would.

    With a prefix a chunk goes on from the prefix's last position and speed; without, it starts from rest. Grippers and
    end effectors stay where they are.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._home: np.ndarray | None = None

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        state = observation.state.reshape(-1, BIMANUAL_COLUMNS)[-1].astype(np.float64)
        self._home = state if self._home is None else self._home
        goal = (self._home + self._rng.uniform(-REACH_RAD, REACH_RAD, BIMANUAL_COLUMNS) - state) * JOINTS
        given = np.zeros((0, BIMANUAL_COLUMNS)) if prefix is None else prefix.astype(np.float64)
        # Without a prefix the first action is where the robot is.
        begin = given if len(given) else np.zeros((1, BIMANUAL_COLUMNS))
        last, speed = begin[-1], begin[-1] - begin[-2] if len(begin) > 1 else np.zeros(BIMANUAL_COLUMNS)
        steps = np.arange(1, CHUNK_LENGTH - len(begin) + 1)[:, None]
        share = steps / steps[-1]
        ease = share**3 * (10 - 15 * share + 6 * share**2)
        coasting = speed * BLEND_STEPS * (1 - np.exp(-steps / BLEND_STEPS))
        path = last + (goal - last) * JOINTS * ease + coasting * (1 - ease)
        actions = np.concatenate([begin, path]).astype(np.float32)
        return ActionChunk(
            actions=actions,
            normalized=actions,
            active_columns=JOINTS,
            robot_type=observation.robot_type or "bimanual",
            prefix_length=len(given),
            timestamp_s=observation.timestamp_s,
        )
