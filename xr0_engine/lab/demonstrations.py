"""Demonstrations of the lab's tasks as datasets: made in memory, drawn when they are read, always the same.

An episode begins at the moment of a change: the picture shows the new scene from its first tick on, the robot moves or
stands as it did towards the old one, and goes on so for a lag of 0 to MOST_LAG ticks before it turns. Nothing changes
after that, so no label follows a scene that its picture does not show, and no picture is older than what a prefix of
the chunk was chosen by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from xr0_engine.lab.drawing import ROBOT_RADIUS, draw
from xr0_engine.lab.experts import CLEARANCE, actions_of, chosen_sides, command
from xr0_engine.lab.robots import VIEW, profile, states
from xr0_engine.lab.tasks import MOST_LAG, RATE_HZ, TASKS, PointTask, Scene, move
from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.training.data.description import Description
from xr0_engine.training.data.episode import Episode, Status
from xr0_engine.training.data.motion import Motion, PlainMotion
from xr0_engine.training.data.pictures import Drawn
from xr0_engine.training.data.sources import dataset

EPISODES = 4000
LONGEST_BEFORE = 20
"""Ticks that a robot has been on its way to the old scene, at most, when the episode begins."""
RESTING_SHARE = 0.4
"""Of the episodes: the robot rests at the old scene when they begin."""
AMISS = 0.08
"""Standard deviation of where a robot is beside the place where it should be: policies are never quite there."""


@dataclass(frozen=True, eq=False)
class Paths:
    """E episodes of N ticks. positions, velocities, wanted: (E, N, R, 2), at each tick, in units and units a step; what
    was commanded there. goals: (E, R, 2). obstacles: (E, 3), or None."""

    positions: np.ndarray
    velocities: np.ndarray
    wanted: np.ndarray
    goals: np.ndarray
    obstacles: np.ndarray | None


class Demonstrations:
    """The demonstrations of one task: a training.data.sources.Source."""

    def __init__(self, task: PointTask, episodes: int = EPISODES, seed: int = 0) -> None:
        self._task, self._paths = task, demonstrate(task, episodes, seed)
        ticks = self._paths.positions.shape[1]
        self._loaded: dict[int, Episode] = {}
        self.description = Description(Path(), task.robot_type, profile(task.robot_type))
        self.names: Sequence[str] = tuple(f"{task.name}/{number:06d}" for number in range(episodes))
        self.lengths: Sequence[int] = (ticks,) * episodes
        success: Status = "success"
        self.statuses: Sequence[Status] = (success,) * episodes

    def load(self, number: int) -> Episode:
        # Each is read once a tick, in random order: kept, as it is small without its pictures.
        if number not in self._loaded:
            self._loaded[number] = self._make(number)
        return self._loaded[number]

    def _make(self, number: int) -> Episode:
        paths, task, name = self._paths, self._task, self.names[number]
        places, goals = paths.positions[number], paths.goals[number]
        obstacle = None if paths.obstacles is None else paths.obstacles[number]
        clip = Drawn(name, len(places), RATE_HZ, partial(_picture, places, goals, obstacle))
        motion = _motion(task, places, paths.velocities[number], paths.wanted[number])
        return Episode(name, "success", (task.instruction,), {VIEW: clip}, motion, RATE_HZ)


@dataset
def chase_four() -> Demonstrations:
    return Demonstrations(TASKS["chase-four"])


@dataset
def chase_eight() -> Demonstrations:
    return Demonstrations(TASKS["chase-eight"])


@dataset
def chase_anywhere() -> Demonstrations:
    return Demonstrations(TASKS["chase-anywhere"])


@dataset
def chase_two() -> Demonstrations:
    return Demonstrations(TASKS["chase-two"])


@dataset
def two_ways() -> Demonstrations:
    return Demonstrations(TASKS["two-ways"])


DATASETS: dict[str, Callable[[], Demonstrations]] = {
    "chase-four": chase_four,
    "chase-eight": chase_eight,
    "chase-anywhere": chase_anywhere,
    "chase-two": chase_two,
    "two-ways": two_ways,
}
"""Task -> its dataset."""


def demonstrate(task: PointTask, episodes: int, seed: int) -> Paths:
    """Episodes as described above, the same for a seed. Where both ways past an obstacle are open, a coin is tossed
    once an episode."""
    rng = np.random.default_rng((seed, list(TASKS).index(task.name)))
    # What was, before what the robot goes to when the episode begins, before what it then has to go to.
    begun = [task.first(rng) for _ in range(episodes)]
    old = [task.next(rng, scene) for scene in begun]
    crosses = old[0].obstacle is not None
    begun, old, new = (begun, begun, old) if crosses else (begun, old, [task.next(rng, scene) for scene in old])
    olds, news = (np.stack([scene.goals for scene in scenes]) for scenes in (old, new))
    positions = np.stack([scene.goals for scene in begun]) + rng.normal(0, AMISS, olds.shape)
    velocities = np.zeros_like(positions)
    resting = rng.random(episodes) < RESTING_SHARE
    positions[resting] = (olds + rng.normal(0, AMISS / 2, olds.shape))[resting]
    before = np.where(resting, 0, rng.integers(0, LONGEST_BEFORE + 1, episodes))
    lags = rng.integers(0, MOST_LAG + 1, episodes)
    obstacles = np.stack([scene.obstacle for scene in new if scene.obstacle is not None]) if crosses else None
    if obstacles is not None:
        # The others were left somewhere on the way, by a policy that had begun it.
        places, speeds = _on_the_way(task, rng, news, obstacles)
        positions[~resting], velocities[~resting] = places[~resting], speeds[~resting]
        before[:], lags[~resting] = 0, 0
    coins = np.where(rng.random((episodes, 1)) < 0.5, 1, -1)
    for tick in range(LONGEST_BEFORE):
        wanted = command(task, positions, velocities, Scene(olds), coins)
        moved = move(task, positions, velocities, wanted)
        under_way = (tick >= LONGEST_BEFORE - before)[:, None, None]
        positions, velocities = np.where(under_way, moved[0], positions), np.where(under_way, moved[1], velocities)
    target = Scene(news, None if obstacles is None else obstacles[:, None])
    if target.obstacle is not None:
        chosen = chosen_sides(positions, velocities, news, target.obstacle)
        coins = np.where(chosen == 0, coins, chosen)
    told: list[tuple[np.ndarray, ...]] = []
    for tick in range(task.stands[1]):
        towards_new = command(task, positions, velocities, target, coins)
        towards_old = command(task, positions, velocities, Scene(olds), coins)
        wanted = np.where((tick >= lags)[:, None, None], towards_new, towards_old)
        told.append((positions, velocities, wanted))
        positions, velocities = move(task, positions, velocities, wanted)
    at, speed, wanted = (np.stack(part, axis=1) for part in zip(*told, strict=True))
    return Paths(at, speed, wanted, news, obstacles)


def _picture(places: np.ndarray, goals: np.ndarray, obstacle: np.ndarray | None, frame: int) -> np.ndarray:
    return draw(places[frame], goals, obstacle)


def _on_the_way(
    task: PointTask, rng: np.random.Generator, goals: np.ndarray, obstacles: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(E, 1, 2) places before (E, 3) obstacles and beside them, and velocities, as a policy may get there."""
    obstacles = obstacles[:, None]
    forward = goals - obstacles[..., :2]
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    left = np.stack([-forward[..., 1], forward[..., 0]], axis=-1)
    shape = (len(goals), 1, 1)
    along, across = rng.uniform(-0.8, 0.1, shape), rng.normal(0, 0.12, shape)
    # Beside the obstacle, not on it.
    free = np.sqrt(np.maximum((obstacles[..., 2:] + ROBOT_RADIUS + CLEARANCE / 2) ** 2 - along**2, 0))
    across = across + np.where(across < 0, -1, 1) * free
    speed = rng.uniform(0, task.speed, shape)
    turn = rng.normal(0, 0.25, shape)
    velocities = speed * (np.cos(turn) * forward + np.sin(turn) * left)
    return obstacles[..., :2] + along * forward + across * left, velocities


def _motion(task: PointTask, positions: np.ndarray, velocities: np.ndarray, wanted: np.ndarray) -> Motion:
    """Of one episode: (N, R, 2) each. As arms do not turn, anchoring a place takes away where the arm is."""
    columns = np.isin(np.arange(BIMANUAL_COLUMNS), task.columns)
    targets = np.zeros((len(positions), BIMANUAL_COLUMNS))
    origins = np.zeros_like(targets)
    targets[:, columns] = actions_of(task, positions, wanted).reshape(len(positions), -1)
    if task.commands_places:
        origins[:, columns] = positions.reshape(len(positions), -1)
    return PlainMotion(states(positions, velocities), targets, origins, columns)
