"""How the lab's tasks are done: what a demonstrator commands, and a policy that looks into the task and plans."""

from __future__ import annotations

import numpy as np

from xr0_engine.lab.drawing import ROBOT_RADIUS
from xr0_engine.lab.tasks import CHUNK, RATE_HZ, PointEnv, PointTask, Scene, limited, move
from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.robot.layouts import BIMANUAL, PLAIN
from xr0_engine.types import ActionChunk, Observation, RobotInfo

CLEARANCE = 0.18
"""Between robot and obstacle, where an expert passes it."""
SWERVE = 0.25
"""So far before it must, an expert leaves the straight way: what it takes to get beside the obstacle."""
ASIDE, ASIDE_STEP = 0.07, 0.015
"""A robot that is so far beside the straight way, or gets so far beside it in a step, has chosen its side."""


def pursue(task: PointTask, positions: np.ndarray, velocities: np.ndarray, goals: np.ndarray) -> np.ndarray:
    """(..., 2) velocities to command now, to come to rest at (..., 2) goals: as fast as can be stopped from there."""
    way = goals - positions
    distance = np.linalg.norm(way, axis=-1, keepdims=True)
    acceleration = task.acceleration
    # At v, braking by `acceleration` a step takes v^2 / 2a + v / 2.
    stoppable = acceleration * (np.sqrt(0.25 + 2 * distance / acceleration) - 0.5)
    speed = np.minimum(np.minimum(stoppable, distance), task.speed)
    return _changed(task, velocities, way * (speed / np.maximum(distance, 1e-12)))


def swerve(
    task: PointTask,
    positions: np.ndarray,
    velocities: np.ndarray,
    goals: np.ndarray,
    obstacles: np.ndarray,
    sides: np.ndarray,
) -> np.ndarray:
    """As pursue, past (..., 3) obstacles. sides: (...,) 1 leaves them on the right, -1 on the left."""
    along = _seen_from(positions, goals, obstacles)[0]
    clear = obstacles[..., 2] + ROBOT_RADIUS + CLEARANCE
    centre = obstacles[..., :2] - positions
    distance = np.maximum(np.linalg.norm(centre, axis=-1), 1e-12)
    # Along the tangent of the circle that is clear of the obstacle; from within, out of it.
    turn = sides * np.where(distance > clear, np.arcsin(np.minimum(1.0, clear / distance)), np.pi / 2 + 0.5)
    cosine, sine = np.cos(turn), np.sin(turn)
    x, y = centre[..., 0], centre[..., 1]
    tangent = np.stack([cosine * x - sine * y, sine * x + cosine * y], axis=-1)
    around = _changed(task, velocities, tangent / distance[..., None] * task.speed)
    way = goals - positions
    way = way / np.maximum(np.linalg.norm(way, axis=-1, keepdims=True), 1e-12)
    misses_by = np.abs(x * way[..., 1] - y * way[..., 0])
    is_ahead = (centre * way).sum(-1) > 0
    swerves = is_ahead & (misses_by < clear) & (along > -(clear + SWERVE))
    return np.where(swerves[..., None], around, pursue(task, positions, velocities, goals))


def chosen_sides(positions: np.ndarray, velocities: np.ndarray, goals: np.ndarray, obstacles: np.ndarray) -> np.ndarray:
    """(...,) the side on which robots have begun to pass: as swerve's, 0 where both ways are open."""
    _, across, _, left = _seen_from(positions, goals, obstacles)
    drift = (velocities * left).sum(-1)
    begun = (np.abs(across) > ASIDE) | (np.abs(drift) > ASIDE_STEP)
    return np.where(begun, np.where(across + 3 * drift >= 0, 1, -1), 0)


def command(
    task: PointTask, positions: np.ndarray, velocities: np.ndarray, scene: Scene, sides: np.ndarray
) -> np.ndarray:
    """(..., 2) velocities that the expert commands. sides: (...,), of tasks with an obstacle."""
    if scene.obstacle is None:
        return pursue(task, positions, velocities, scene.goals)
    return swerve(task, positions, velocities, scene.goals, scene.obstacle, sides)


def actions_of(task: PointTask, positions: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(..., 2) velocities as the task's robots are told them."""
    return positions + wanted if task.commands_places else wanted


class PointExpert:
    """Plans a chunk from what the task is at the call, as a policy. env: the one that it looks into.

    It reacts at once. A prefix is honoured: it comes back as it is, and the plan goes on from where it leads. seed: of
    the coins by which it chooses a way, one a call, where neither the robot nor the prefix has begun one.
    """

    def __init__(self, env: PointEnv, seed: int = 0, length: int = CHUNK) -> None:
        self._env, self._length = env, length
        self._coins = np.random.default_rng(seed)

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        task = self._env.task
        layout = BIMANUAL if task.commands_places else PLAIN
        return RobotInfo(
            chunk_length=self._length,
            control_rate_hz=RATE_HZ,
            replan_every=None,
            views=("top",),
            layout=layout.name,
            action_width=BIMANUAL_COLUMNS,
            max_prefix=self._length - 1,
            step_columns=None if task.commands_places else task.columns,
        )

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        """prefix: (P, 32) float32, as in executor.Policy. Raises ValueError if it leaves nothing to plan."""
        env, task = self._env, self._env.task
        given = np.zeros((0, BIMANUAL_COLUMNS), np.float32) if prefix is None else np.asarray(prefix, np.float32)
        if len(given) >= self._length:
            raise ValueError(f"prefix: expected fewer than {self._length} actions, the chunk's, got {len(given)}")
        origin, scene = env.positions, env.scene
        positions, velocities = env.positions, env.velocities
        for row in given[:, list(task.columns)].astype(np.float64):
            told = row.reshape(-1, 2)
            # Places come anchored at where the arms were.
            positions, velocities = move(
                task, positions, velocities, told + origin - positions if task.commands_places else told
            )
        sides = np.where(self._coins.random(task.robots) < 0.5, 1, -1)
        if scene.obstacle is not None:
            chosen = chosen_sides(positions, velocities, scene.goals, scene.obstacle)
            sides = np.where(chosen == 0, sides, chosen)
        actions = np.zeros((self._length, BIMANUAL_COLUMNS), np.float32)
        actions[: len(given)] = given
        for row in actions[len(given) :]:
            wanted = command(task, positions, velocities, scene, sides)
            told = actions_of(task, positions, wanted)
            row[list(task.columns)] = (told - origin if task.commands_places else told).ravel()
            positions, velocities = move(task, positions, velocities, wanted)
        active = np.isin(np.arange(BIMANUAL_COLUMNS), task.columns)
        return ActionChunk(
            actions, np.zeros_like(actions), active, task.robot_type, len(given), observation.timestamp_s
        )


def _changed(task: PointTask, velocities: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    changed: np.ndarray = velocities + limited(wanted - velocities, task.acceleration)
    return changed


def _seen_from(
    positions: np.ndarray, goals: np.ndarray, obstacles: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(...,) how far past the obstacle's centre robots are on the way to their goals, and how far left of it; (..., 2)
    unit vectors forward and to the left."""
    forward = goals - obstacles[..., :2]
    forward = forward / np.maximum(np.linalg.norm(forward, axis=-1, keepdims=True), 1e-12)
    left = np.stack([-forward[..., 1], forward[..., 0]], axis=-1)
    apart = positions - obstacles[..., :2]
    return (apart * forward).sum(-1), (apart * left).sum(-1), forward, left
