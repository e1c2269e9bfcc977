"""What an evaluation is made of: benchmarks with suites of tasks, worlds that act a trial out, and what came of it.

A benchmark is data: it is sent to the processes that simulate. A world is a simulator in such a process. Neither
imports torch, and a benchmark's module imports its simulator inside functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from xr0_engine.executor import Policy
from xr0_engine.robot.layouts import Pose
from xr0_engine.types import Observation

Mode = Literal["sync", "naive", "async", "guided"]
"""How chunks are executed: `naive` is the executor's naive_async, without a prefix or a guide."""


@dataclass(frozen=True)
class Task:
    """One task of a suite. index: its number in the suite, from 0. name: the simulator's. instruction: in plain words,
    as the simulator has them."""

    suite: str
    index: int
    name: str
    instruction: str


@dataclass(frozen=True)
class Trial:
    """One episode to run: trial `number` of a task, executed in a mode with an inference that takes delay_steps control
    steps of simulated time. Its fields but the mode and the delay decide where everything lies."""

    task: Task
    number: int
    seed: int
    mode: Mode = "sync"
    delay_steps: float = 0

    @property
    def key(self) -> tuple[str, int, int, str, float]:
        """What tells it from the other trials of a run: suite, task, number, mode, delay."""
        return self.task.suite, self.task.index, self.number, self.mode, self.delay_steps


@runtime_checkable
class ShowsViews(Protocol):
    """A World that need not render what the policy does not take."""

    def show(self, views: Sequence[str]) -> None:
        """Observations hold these views alone from now on, as far as there are such."""


class World(Protocol):
    """One simulated environment, for one trial after another; lives in a process of its own.

    A trial is one rollout or several (a chain of subtasks, piece after piece): the policy starts afresh in each.
    """

    def reset(self, trial: Trial) -> None:
        """Begin a trial, and its first rollout: everything that the benchmark does before the policy's first look."""

    @property
    def horizon(self) -> int:
        """Control steps that the current rollout may take, from its begin."""

    def observe(self) -> Observation:
        """What the policy sees now; cameras are rendered here and nowhere else. timestamp_s is the caller's to set."""

    def pose(self) -> Pose | None:
        """Where chunks are anchored now; None if the layout anchors nothing."""

    def step(self, row: np.ndarray) -> None:
        """One control step. row: (A,) float64, a command of the executor: absolute targets for anchored layouts."""

    @property
    def success(self) -> bool:
        """Whether the current rollout has reached its goal; the benchmark's own predicate."""

    def proceed(self) -> bool:
        """After a rollout, successful or at its horizon: begin the next one of this trial. False: the trial is over."""

    def picture(self) -> np.ndarray:
        """(height, width, 3) uint8, upright, for people to look at."""

    def rest(self) -> np.ndarray | None:
        """(n,) float64, the first n columns of a command that stands still, for control steps before a delayed run's
        first chunk; None: zeros, or where it is if the layout is anchored."""

    def facts(self) -> Mapping[str, Any]:
        """More about the trial so far, for its line in the results: JSON values. Empty if there is none."""

    def close(self) -> None: ...


class Benchmark(Protocol):
    """A benchmark with its protocol; a frozen dataclass whose fields are the protocol's named options."""

    @property
    def name(self) -> str:
        """As on the command line: libero, aloha, calvin, simpler."""

    @property
    def rate_hz(self) -> float:
        """Control steps per second of simulated time."""

    @property
    def execute(self) -> int:
        """Actions of each chunk that mode sync executes before it looks again."""

    @property
    def robot_type(self) -> str | None:
        """Of the observations: the released checkpoint's, if the policy has several; None: the policy's only one."""

    def suites(self) -> Mapping[str, Sequence[Task]]:
        """Name -> tasks, in the order of reports. Raises RuntimeError, with the remedy, without the simulator."""

    def trials(self, task: Task) -> int:
        """How many trials of a task the released protocol has."""

    def protocol(self) -> Mapping[str, Any]:
        """All that decides a success rate besides policy and execution, as JSON; equal in runs that are compared."""

    def versions(self) -> Mapping[str, str]:
        """Of the simulator, its assets and its renderer. Raises RuntimeError, with the remedy, for what is missing."""

    def open(self) -> World:
        """In the process that simulates."""

    def expert(self, world: World) -> Policy | None:
        """A scripted policy that looks into the world, to see that a success can be had; None if there is none."""


@dataclass(frozen=True)
class Episode:
    """What came of a trial: one line of the results.

    suite, task, name, trial, seed, mode, delay_steps: the trial's. success: every rollout reached its goal; solved, of
    rollouts: how many did. steps: control steps. calls: inferences. latency_ms: p50 and p99 of those calls on the wall
    clock. reaction_ms: p50 and p99, over executed actions, of the simulated time from the observation that chose an
    action to its execution. error: why a trial that raised did not go on (it counts as a failure); None without.
    repeats: how often it was run again because a server, a simulator or a process died under it. video: its file,
    relative to the results' folder. facts: the world's.
    """

    suite: str
    task: int
    name: str
    trial: int
    seed: int
    mode: Mode
    delay_steps: float
    success: bool
    solved: int
    rollouts: int
    steps: int
    calls: int
    latency_ms: Mapping[str, float]
    reaction_ms: Mapping[str, float]
    wall_s: float
    error: str | None = None
    repeats: int = 0
    video: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trial: Trial, **outcome: Any) -> Episode:
        """With the trial's fields; outcome: all others."""
        return cls(
            suite=trial.task.suite,
            task=trial.task.index,
            name=trial.task.name,
            trial=trial.number,
            seed=trial.seed,
            mode=trial.mode,
            delay_steps=float(trial.delay_steps),
            **outcome,
        )

    @property
    def key(self) -> tuple[str, int, int, str, float]:
        """As Trial.key."""
        return self.suite, self.task, self.trial, self.mode, self.delay_steps


@dataclass(frozen=True)
class Run:
    """What all episodes of a results folder have in common; two runs compare only where these agree.

    benchmark, protocol, versions: the benchmark's. policy: `title`, `kind` (engine, server, openpi, expert), and what
    is known of `checkpoint` (sha256 of its files), `robot_type`, `dtype`, `backend`. execution: `rate_hz`, `execute`,
    `trigger`, `margin`, `max_prefix`, `seed`. code: `version` and, from a clone, `commit`. machine: `processor`, `gpu`.
    """

    benchmark: str
    protocol: Mapping[str, Any]
    versions: Mapping[str, str]
    policy: Mapping[str, Any]
    execution: Mapping[str, Any]
    code: Mapping[str, Any]
    machine: Mapping[str, Any]
    created: str
