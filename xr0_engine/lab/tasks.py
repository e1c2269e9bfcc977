"""The lab's tasks: point robots on a square, and discs to reach that jump. Gymnasium's interface, NumPy alone.

The floor is the square from -1 to 1 on both axes; time goes by control steps, ten a second. What lies on the floor, a
Scene, changes at the steps of a schedule that is drawn when an episode begins and depends on its seed alone: robots
change nothing of it, so that episodes of two policies are pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xr0_engine.lab.drawing import GOAL_RADIUS, ROBOT_RADIUS, draw

RATE_HZ = 10.0
CHUNK = 16
"""Actions in a chunk."""
MOST_LAG = 6
"""Control steps by which a demonstrator's reaction lags at most: as long as the longest published prefix."""
REACHED = GOAL_RADIUS
"""A robot is at its disc when its centre is so near to the disc's: over it."""
STRONGER = 1.5
"""How much more acceleration a robot has than its expert uses: a policy that is a little off is no failure yet."""
WALL = 1.05
"""Robots do not get beyond it."""
BLINKS = (4, 10)
"""Control steps, least and most, of a disc that stands too briefly to be reached: it catches robots in mid-motion."""
BLINK_SHARE = 0.5
"""Of the jumps that are followed by one, after so few steps."""
FIRST_STANDS = (6, 14)
"""The same for where a robot begins: on its disc."""

CORNERS = np.array([(-0.7, -0.7), (-0.7, 0.7), (0.7, -0.7), (0.7, 0.7)])
EIGHT = np.concatenate([CORNERS, [(-0.8, 0.0), (0.8, 0.0), (0.0, -0.8), (0.0, 0.8)]])
ANYWHERE = 0.85
"""Where discs may be anywhere, their centres are within this of the middle on both axes."""
APART = 0.5
"""How far a disc jumps at least."""
TWO_APART = 0.12
"""The two arms' halves of the floor begin so far from the middle."""
END = 0.85
"""How far from the middle the two ends are, between which an obstacle lies."""
OBSTACLE_AT = (0.46, 0.54)
"""Where on the straight way, as a share of it."""
OBSTACLE_RADIUS = (0.17, 0.23)


@dataclass(frozen=True, eq=False)
class Scene:
    """goals: (R, 2), each robot's disc. obstacle: (3,) x, y, radius of a disc that must not be touched, or None."""

    goals: np.ndarray
    obstacle: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Change:
    """From control step `step` on the floor is `scene`. counts: it stands for long enough to be reached, so that it
    counts as reached or missed."""

    step: int
    scene: Scene
    counts: bool


Places = Literal["corners", "eight", "anywhere", "halves", "ends"]
"""Where discs may be: CORNERS; EIGHT; anywhere; anywhere in the half of the floor that is the arm's; at either end."""


@dataclass(frozen=True)
class PointTask:
    """What a task is. columns: the model's action columns that the robots have: velocities in units a step, or, in the
    bimanual layout, places to be at. speed: the expert's, in units a step; acceleration: in units a step a step.
    stands: control steps that a disc stands at least and at most, until it jumps: what the farthest way takes, and to
    spare."""

    name: str
    instruction: str
    robot_type: str
    columns: tuple[int, ...]
    places: Places
    speed: float = 0.1
    acceleration: float = 0.03
    stands: tuple[int, int] = (32, 42)

    @property
    def robots(self) -> int:
        return len(self.columns) // 2

    @property
    def has_obstacles(self) -> bool:
        return self.places == "ends"

    @property
    def commands_places(self) -> bool:
        """Whether an action says where to be, in units of the floor, instead of how far to move in a step."""
        return self.places == "halves"

    def first(self, rng: np.random.Generator) -> Scene:
        """What an episode begins with: robots stand on their discs."""
        if self.places == "ends":
            angle = rng.uniform(-0.3, 0.3) + (0.0 if rng.random() < 0.5 else np.pi)
            # As if just arrived: the obstacle lies behind, as in all that a policy is shown.
            return self._across(rng, Scene(END * np.array([[np.cos(angle), np.sin(angle)]])))
        return Scene(np.stack([self._place(rng, robot) for robot in range(self.robots)]))

    def next(self, rng: np.random.Generator, scene: Scene) -> Scene:
        """What it changes to: at least one disc is elsewhere."""
        if self.places == "ends":
            return self._across(rng, scene)
        goals = scene.goals.copy()
        jumping = range(self.robots)
        if self.robots == 2 and (which := int(rng.integers(4))) < 2:
            jumping = range(which, which + 1)
        for robot in jumping:
            while np.linalg.norm(goals[robot] - scene.goals[robot]) < APART:
                goals[robot] = self._place(rng, robot)
        return Scene(goals)

    def _place(self, rng: np.random.Generator, robot: int) -> np.ndarray:
        if self.places == "halves":
            x, y = rng.uniform(TWO_APART, ANYWHERE), rng.uniform(-ANYWHERE, ANYWHERE)
            return np.array([x if robot else -x, y])
        if self.places == "anywhere":
            return rng.uniform(-ANYWHERE, ANYWHERE, 2)
        known = CORNERS if self.places == "corners" else EIGHT
        place: np.ndarray = known[rng.integers(len(known))]
        return place

    def _across(self, rng: np.random.Generator, scene: Scene) -> Scene:
        """The other end, and an obstacle on the straight way there."""
        start = scene.goals[0]
        angle = np.arctan2(-start[1], -start[0]) + rng.uniform(-0.15, 0.15)
        goal = END * np.array([np.cos(angle), np.sin(angle)])
        place = start + rng.uniform(*OBSTACLE_AT) * (goal - start)
        return Scene(goal[None], np.array([*place, rng.uniform(*OBSTACLE_RADIUS)]))


POINT, TWO_ARMS = "lab_point", "lab_two_arms"
"""Robot types: a point that is told velocities; two that are told places, in the bimanual layout."""
# Positions x and y of both arms (robot/layouts.py: BIMANUAL).
BOTH_ARMS = (0, 1, 14, 15)

TASKS = {
    task.name: task
    for task in (
        PointTask("chase-four", "Move to the disc.", POINT, (0, 1), "corners"),
        PointTask("chase-eight", "Move to the disc.", POINT, (0, 1), "eight"),
        PointTask("chase-anywhere", "Move to the disc.", POINT, (0, 1), "anywhere"),
        PointTask("chase-two", "Move to the disc.", TWO_ARMS, BOTH_ARMS, "halves"),
        PointTask("two-ways", "Move to the disc.", POINT, (0, 1), "ends"),
    )
}
"""Name -> task. `two-ways`: from one end of the floor to the other, past an obstacle, left of it or right of it."""


def find_task(name: str) -> PointTask:
    """Raises ValueError that lists the known names."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def schedule(task: PointTask, seed: int | tuple[int, ...], jumps: int) -> tuple[list[Change], int]:
    """All that changes in an episode, from step 0 on, and how many control steps the episode has.

    jumps: how many changes count; each stands as long as the task says until the next, or until the end.
    """
    rng = np.random.default_rng(seed)
    changes = [Change(0, task.first(rng), counts=False)]
    step = int(rng.integers(FIRST_STANDS[0], FIRST_STANDS[1] + 1))
    for _ in range(jumps):
        # Two ways cross the floor one after the other: there is none to be interrupted.
        if task.places != "ends" and rng.random() < BLINK_SHARE:
            changes.append(Change(step, task.next(rng, changes[-1].scene), counts=False))
            step += int(rng.integers(BLINKS[0], BLINKS[1] + 1))
        changes.append(Change(step, task.next(rng, changes[-1].scene), counts=True))
        step += int(rng.integers(task.stands[0], task.stands[1] + 1))
    return changes, step


def limited(vectors: np.ndarray, most: float) -> np.ndarray:
    """(..., 2) vectors, those longer than `most` made as long."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    shortened: np.ndarray = vectors * np.minimum(1.0, most / np.maximum(length, 1e-12))
    return shortened


def move(
    task: PointTask, positions: np.ndarray, velocities: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One control step: (..., 2) positions and velocities after it. wanted: (..., 2) velocities that are told."""
    velocities = velocities + limited(wanted - velocities, STRONGER * task.acceleration)
    reached = np.clip(positions + velocities, -WALL, WALL)
    return reached, reached - positions


class PointEnv:
    """One episode after another of a task, as gymnasium has it: reset, step; nothing is drawn that is not asked for.

    An observation is {"image": (64, 64, 3) uint8, "state": (4 R,) float32, each robot's position and its velocity in
    units a second}. An action is (2 R,), in the order of the task's columns. Options of reset: `events`, how many jumps
    count, default 2; `jumps`, how many of the episode's changes happen at all, None for all: the episode that lacks
    change number k, and all after it, is its twin with jumps=k.
    """

    def __init__(self, task: PointTask) -> None:
        self.task = task
        self.positions = self.velocities = np.zeros((task.robots, 2))
        self.changes: list[Change] = []
        self.horizon = self.steps = 0

    def reset(
        self, seed: int | tuple[int, ...] = 0, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Raises ValueError for an option that is unknown."""
        self.begin(seed, **(options or {}))
        return self.observation(), self.info()

    def begin(self, seed: int | tuple[int, ...], events: int = 2, jumps: int | None = None) -> None:
        """As reset, without drawing."""
        if events < 1 or (jumps is not None and jumps < 0):
            raise ValueError(f"events, jumps: expected at least 1, and at least 0 or None, got {events} and {jumps}")
        changes, self.horizon = schedule(self.task, seed, events)
        self.changes = changes if jumps is None else changes[: jumps + 1]
        self.steps = 0
        self.positions = changes[0].scene.goals.copy()
        self.velocities = np.zeros_like(self.positions)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Gymnasium's five: the reward is minus the mean distance from the discs; an episode ends at its horizon."""
        self.act(action)
        return self.observation(), -self.distance, False, self.steps >= self.horizon, self.info()

    def act(self, action: np.ndarray) -> None:
        """As step, without drawing. Raises ValueError for another shape, or values that are not finite."""
        told = np.asarray(action, dtype=np.float64)
        if told.shape != (2 * self.task.robots,) or not np.isfinite(told).all():
            raise ValueError(f"action: expected {2 * self.task.robots} finite numbers, got {action!r:.80}")
        wanted = told.reshape(-1, 2)
        if self.task.commands_places:
            wanted = wanted - self.positions
        self.positions, self.velocities = move(self.task, self.positions, self.velocities, wanted)
        self.steps += 1

    @property
    def scene(self) -> Scene:
        """What is on the floor now."""
        return next(change.scene for change in reversed(self.changes) if change.step <= self.steps)

    @property
    def distance(self) -> float:
        """The mean over the robots of how far they are from their discs."""
        return float(np.linalg.norm(self.positions - self.scene.goals, axis=-1).mean())

    @property
    def at_goal(self) -> bool:
        """Whether every robot is at its disc."""
        return bool((np.linalg.norm(self.positions - self.scene.goals, axis=-1) < REACHED).all())

    @property
    def touches(self) -> bool:
        """Whether a robot touches the obstacle."""
        obstacle = self.scene.obstacle
        if obstacle is None:
            return False
        apart = np.linalg.norm(self.positions - obstacle[:2], axis=-1)
        return bool((apart < obstacle[2] + ROBOT_RADIUS).any())

    def state(self) -> np.ndarray:
        """(4 R,) float32."""
        return np.concatenate([self.positions, self.velocities * RATE_HZ], axis=1).ravel().astype(np.float32)

    def observation(self) -> dict[str, np.ndarray]:
        return {"image": self.picture(), "state": self.state()}

    def picture(self) -> np.ndarray:
        """(64, 64, 3) uint8."""
        scene = self.scene
        return draw(self.positions, scene.goals, scene.obstacle)

    def info(self) -> dict[str, Any]:
        return {"distance": self.distance, "at_goal": self.at_goal, "touches": self.touches}
