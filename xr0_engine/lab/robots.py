"""The lab's robots as the engine and the trainer see them: profiles, states, poses, observations."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from xr0_engine.lab.tasks import POINT, RATE_HZ, TWO_ARMS, PointEnv
from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT, ArmPose, BimanualPose
from xr0_engine.robot.embodiment import Embodiment, load_embodiment
from xr0_engine.types import Observation

PROFILES = {name: Path(__file__).parent / file for name, file in ((POINT, "point.yaml"), (TWO_ARMS, "two_arms.yaml"))}
"""Robot type -> its embodiment profile, for `data.embodiment`."""
VIEW = "top"


@cache
def profile(robot_type: str) -> Embodiment:
    return load_embodiment(PROFILES[robot_type])


def poses(positions: np.ndarray, velocities: np.ndarray) -> BimanualPose:
    """Two points as arms: (..., 2, 2) positions, and velocities in units a step.

    An arm's end lies on the floor and does not turn. The layout's state has joints alone: an arm is a gantry, whose
    first two are its position and whose next two tell its velocity, in units a second.
    """
    steps = positions.shape[:-2]
    arms = []
    for arm in range(2):
        own, speed = positions[..., arm, :], velocities[..., arm, :] * RATE_HZ
        nothing = np.zeros((*steps, 2))
        arms.append(
            ArmPose(
                np.concatenate([own, nothing[..., :1]], axis=-1),
                np.broadcast_to(np.eye(3), (*steps, 3, 3)),
                np.concatenate([own, speed, nothing], axis=-1),
                nothing[..., :1],
            )
        )
    return BimanualPose(*arms)


def states(positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """(N, R, 2) positions and velocities, in units a step -> (N, 32) float32 proprio states.

    One robot's has position and velocity, in units a second; that of two is the layout's, poses(...).state().
    """
    known = np.concatenate([positions, velocities * RATE_HZ], axis=-1)
    rows = np.zeros((len(known), BIMANUAL_COLUMNS), np.float32)
    robots = known.shape[1]
    begins = (LEFT.joints.start, RIGHT.joints.start) if robots == 2 else (0,)
    for robot, begin in enumerate(begins):
        rows[:, begin : begin + 4] = known[:, robot]
    return rows


def pose(env: PointEnv) -> BimanualPose | None:
    """Where chunks are anchored; None for a robot whose chunks are not."""
    return poses(env.positions, env.velocities) if env.task.commands_places else None


def observe(env: PointEnv) -> Observation:
    """What a policy sees of the task now."""
    state = states(env.positions[None], env.velocities[None])[0]
    return Observation({VIEW: env.picture()}, env.task.instruction, state, env.task.robot_type)
