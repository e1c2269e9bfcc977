"""The lab's tasks as benchmarks: an episode lasts as long as its schedule, and succeeds if every disc was reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from xr0_engine.evaluation.benchmark import Task, Trial, World
from xr0_engine.executor import Policy
from xr0_engine.lab import robots
from xr0_engine.lab.experts import PointExpert
from xr0_engine.lab.tasks import CHUNK, RATE_HZ, PointEnv, PointTask, find_task
from xr0_engine.robot.decode import BimanualPose
from xr0_engine.types import Observation


@dataclass(frozen=True)
class Event:
    """A change of the scene, at control step `step`. counts: it stands for long enough to be reached. end: the step of
    the next one, or the episode's end. reached: the first step at which all robots are at their discs; None without.
    hit: a robot touched the obstacle meanwhile."""

    step: int
    counts: bool
    end: int
    reached: int | None
    hit: bool

    @property
    def success(self) -> bool:
        return self.reached is not None and not self.hit


@dataclass(frozen=True)
class PointBenchmark:
    """One task. events: changes of an episode that count. jumps: how many of its changes happen at all, None for all;
    see PointEnv. execute: actions of each chunk that mode sync executes. Raises ValueError that names the field."""

    task: str
    events: int = 2
    jumps: int | None = None
    execute: int = CHUNK // 2

    name = "lab"
    rate_hz = RATE_HZ

    def __post_init__(self) -> None:
        find_task(self.task)
        if self.events < 1:
            raise ValueError(f"events: expected at least 1, got {self.events}")
        if self.jumps is not None and self.jumps < 0:
            raise ValueError(f"jumps: expected at least 0, or None, got {self.jumps}")
        if not 1 <= self.execute <= CHUNK:
            raise ValueError(f"execute: expected 1 to {CHUNK}, got {self.execute}")

    @property
    def robot_type(self) -> str:
        return find_task(self.task).robot_type

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return {self.task: (Task(self.task, 0, self.task, find_task(self.task).instruction),)}

    def trials(self, task: Task) -> int:
        return 200

    def protocol(self) -> Mapping[str, Any]:
        return asdict(self)

    def versions(self) -> Mapping[str, str]:
        return {"numpy": version("numpy")}

    def open(self) -> PointWorld:
        return PointWorld(self)

    def expert(self, world: World) -> Policy | None:
        if not isinstance(world, PointWorld):
            raise ValueError(f"world: expected a PointWorld, which the expert looks into, got {type(world).__name__}")
        return PointExpert(world.env, world.seed)


class PointWorld:
    """The floor of one task; what happened on it is kept, step by step, until the next reset.

    positions, velocities, goals: (R, 2) before each control step, and after the last. commands: (2 R,) of each step.
    """

    def __init__(self, benchmark: PointBenchmark) -> None:
        self._benchmark = benchmark
        self._task: PointTask = find_task(benchmark.task)
        self.env = PointEnv(self._task)
        self.seed = 0
        self.positions: list[np.ndarray] = []
        self.velocities: list[np.ndarray] = []
        self.goals: list[np.ndarray] = []
        self.commands: list[np.ndarray] = []
        self._touches: list[bool] = []
        self._at_goal: list[bool] = []

    def reset(self, trial: Trial) -> None:
        """Raises ValueError for a trial of another task."""
        if trial.task.name != self._task.name:
            raise ValueError(f"trial: expected one of task {self._task.name!r}, got {trial.task.name!r}")
        self.seed = int(np.random.SeedSequence((trial.seed, trial.number)).generate_state(1)[0])
        self.env.begin(self.seed, self._benchmark.events, self._benchmark.jumps)
        self.positions, self.velocities, self.goals, self.commands = [], [], [], []
        self._touches, self._at_goal = [], []
        self._keep()

    @property
    def horizon(self) -> int:
        return self.env.horizon

    def observe(self) -> Observation:
        return robots.observe(self.env)

    def pose(self) -> BimanualPose | None:
        return robots.pose(self.env)

    def step(self, row: np.ndarray) -> None:
        """row: (32,) float64; the task's columns count."""
        self.commands.append(row[list(self._task.columns)])
        self.env.act(self.commands[-1])
        self._keep()

    @property
    def success(self) -> bool:
        """At the end: whether every disc that counts was reached, and no obstacle touched."""
        return self.env.steps >= self.env.horizon and all(event.success for event in self.events() if event.counts)

    def proceed(self) -> bool:
        return False

    def picture(self) -> np.ndarray:
        return self.env.picture()

    def rest(self) -> np.ndarray | None:
        return None

    def events(self) -> list[Event]:
        """The changes of the episode so far, without what lay there when it began."""
        changes, end = self.env.changes[1:], self.env.horizon
        found = []
        ends = [*(later.step for later in changes[1:]), end][: len(changes)]
        for change, until in zip(changes, ends, strict=True):
            during = range(change.step, min(until, len(self._at_goal)))
            reached = next((step for step in during if self._at_goal[step]), None)
            hit = any(self._touches[step] for step in during)
            found.append(Event(change.step, change.counts, until, reached, hit))
        return found

    def facts(self) -> Mapping[str, Any]:
        """events: how many count. reached: of these, how many without touching an obstacle. hits. distance: the mean
        over steps and robots of how far they are from their discs."""
        counted = [event for event in self.events() if event.counts]
        apart = np.linalg.norm(np.stack(self.positions) - np.stack(self.goals), axis=-1)
        return {
            "events": len(counted),
            "reached": sum(event.success for event in counted),
            "hits": sum(event.hit for event in counted),
            "distance": round(float(apart.mean()), 6),
        }

    def close(self) -> None: ...

    def _keep(self) -> None:
        env = self.env
        self.positions.append(env.positions)
        self.velocities.append(env.velocities)
        self.goals.append(env.scene.goals)
        self._touches.append(env.touches)
        self._at_goal.append(env.at_goal)
