"""A benchmark without a simulator: a point on a table that is told to move to a goal. It can be made to fail.

State: (32,), the point's position 0:2, the goal's 2:4. Actions, layout plain: columns 0:2 move the point by at most
REACH, column 6 is a gripper that must be 1 at the goal; layout bimanual: joints 0 and 1 of the left arm are the
position.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.evaluation.benchmark import Episode, Run, Task, Trial
from xr0_engine.robot.decode import ArmPose, BimanualPose
from xr0_engine.robot.layouts import LEFT
from xr0_engine.types import ActionChunk, Observation, RobotInfo

WIDTH = 32
REACH = 0.1
NEAR = 0.05
GRIPPER = 6
JOINTS = slice(LEFT.joints.start, LEFT.joints.start + 2)


@dataclass(frozen=True)
class PointBenchmark:
    """horizon: steps of a rollout. rollouts: of a trial; all but the first begin where the last one ended.

    fault: what happens in trial 1 of task 0 at its third step, `raise`, `hang` or `kill`, or before it, `reset`; or at
    once, `open`: no world can be opened. once: a file that is made then; where it is, nothing happens. pace_s: how long
    a step takes.
    """

    horizon: int = 40
    execute: int = 4
    chunk_length: int = 8
    rollouts: int = 1
    tasks: int = 2
    layout: str = "plain"
    fault: str | None = None
    once: str | None = None
    pace_s: float = 0.0
    views: tuple[str, ...] = ("base",)
    robot: str | None = None
    drift: float = 0.0
    missing: str | None = None
    names: tuple[str, ...] = ("near", "far")

    name = "point"
    rate_hz = 20.0

    @property
    def robot_type(self) -> str | None:
        return self.robot

    @property
    def info(self) -> RobotInfo:
        """How the expert is driven."""
        return RobotInfo(
            chunk_length=self.chunk_length,
            control_rate_hz=self.rate_hz,
            replan_every=self.execute,
            views=self.views,
            layout=self.layout,
            action_width=WIDTH,
            max_prefix=self.chunk_length - 1,
            step_columns=tuple(range(6)) if self.layout == "plain" else None,
            two_valued_columns=(GRIPPER,) if self.layout == "plain" else None,
        )

    def suites(self) -> Mapping[str, Sequence[Task]]:
        return {
            suite: [Task(suite, index, f"{suite} {index}", f"Go to {suite} {index}") for index in range(self.tasks)]
            for suite in self.names
        }

    def trials(self, task: Task) -> int:
        return 5

    def protocol(self) -> Mapping[str, Any]:
        return {"horizon": self.horizon, "rollouts": self.rollouts, "layout": self.layout, "drift": self.drift}

    def versions(self) -> Mapping[str, str]:
        if self.missing:
            raise RuntimeError(self.missing)
        return {"point": "1.0"}

    def open(self) -> PointWorld:
        if self.fault == "open":
            raise TypeError("a table of that kind cannot be opened")
        return PointWorld(self)

    def expert(self, world: PointWorld) -> PointExpert:
        return PointExpert(world)


class PointWorld:
    """log: every call with what it was given, for tests that look into it."""

    def __init__(self, benchmark: PointBenchmark) -> None:
        self.benchmark = benchmark
        self.log: list[tuple[str, Any]] = []
        self.point = self.goal = np.zeros(2)

    def reset(self, trial: Trial) -> None:
        self.trial, self._begun = trial, 1
        self._random = np.random.default_rng([trial.seed, trial.task.index, trial.number])
        self.point, self.gripper, self.steps = np.zeros(2), 0.0, 0
        self._new_goal()
        self.log.append(("reset", trial))
        if self.benchmark.fault == "reset" and self._is_due():
            raise ValueError("the table fell over")

    @property
    def horizon(self) -> int:
        return self.benchmark.horizon

    def observe(self) -> Observation:
        state = np.zeros(WIDTH, np.float32)
        state[:4] = [*self.point, *self.goal]
        self.log.append(("observe", self.steps))
        images = {view: self.picture() for view in self.benchmark.views}
        return Observation(images, self.trial.task.instruction, state, self.benchmark.robot_type)

    def pose(self) -> BimanualPose | None:
        if self.benchmark.layout == "plain":
            return None
        joints = np.zeros(6)
        joints[:2] = self.point
        other = ArmPose(np.zeros(3), np.eye(3), np.zeros(6), np.zeros(1))
        return BimanualPose(ArmPose(np.zeros(3), np.eye(3), joints, np.zeros(1)), other)

    def rest(self) -> np.ndarray | None:
        return np.array([0, 0, 0, 0, 0, 0, -1.0]) if self.benchmark.layout == "plain" else None

    def step(self, row: np.ndarray) -> None:
        assert row.shape == (WIDTH,)
        self.log.append(("step", row.copy()))
        if self.benchmark.pace_s:
            time.sleep(self.benchmark.pace_s)
        if self.steps == 2 and self.benchmark.fault in ("raise", "hang", "kill") and self._is_due():
            self._fail()
        if self.benchmark.layout == "plain":
            self.point = self.point + np.clip(row[:2], -REACH, REACH)
            self.gripper = row[GRIPPER]
        else:
            self.point = self.point + np.clip(row[JOINTS] - self.point, -REACH, REACH)
        # A goal that moves punishes whoever acts on what was seen long ago.
        self.goal = self.goal + self.benchmark.drift * np.array([np.cos(self.steps / 3), np.sin(self.steps / 3)])
        self.steps += 1

    @property
    def success(self) -> bool:
        at_goal = np.abs(self.point - self.goal).max() < NEAR
        return bool(at_goal and (self.gripper == 1 or self.benchmark.layout != "plain"))

    def proceed(self) -> bool:
        self.log.append(("proceed", self.success))
        if self._begun == self.benchmark.rollouts:
            return False
        self._begun += 1
        self._new_goal()
        return True

    def picture(self) -> np.ndarray:
        image = np.full((16, 16, 3), 40, np.uint8)
        for place, color in ((self.goal, (0, 255, 0)), (self.point, (255, 0, 0))):
            row, column = np.clip(8 + 8 * place, 0, 15).astype(int)
            image[row, column] = color
        return image

    def facts(self) -> Mapping[str, Any]:
        return {"distance": float(np.abs(self.point - self.goal).max().round(6))}

    def close(self) -> None:
        self.log.append(("close", None))

    def _new_goal(self) -> None:
        far = 0.4 if self.trial.task.suite == "near" else 0.8
        self.goal = self.point + self._random.choice([-1, 1], 2) * self._random.uniform(far / 2, far, 2)

    def _is_due(self) -> bool:
        if (self.trial.task.index, self.trial.number) != (0, 1):
            return False
        if self.benchmark.once is None:
            return True
        try:
            Path(self.benchmark.once).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _fail(self) -> None:
        if self.benchmark.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.benchmark.fault == "hang":
            # Not for ever: who does not notice is to fail, not to hang too.
            time.sleep(HUNG_S)
        raise ArithmeticError("the point left the table")


HUNG_S = 60.0
"""How long a simulator hangs, well over the limits that tests give it."""


class PointExpert:
    """Plans from where point and goal are at the call: straight to the goal, then the gripper is closed."""

    def __init__(self, world: PointWorld) -> None:
        self._world = world

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._world.benchmark.info

    def infer(self, observation: Observation, prefix: np.ndarray | None = None) -> ActionChunk:
        benchmark, start = self._world.benchmark, self._world.point
        actions = np.zeros((benchmark.chunk_length, WIDTH), np.float32)
        length = 0 if prefix is None else len(prefix)
        point = start
        for index, action in enumerate(actions):
            if prefix is not None and index < length:
                action[:] = prefix[index]
            elif benchmark.layout == "plain":
                action[:2] = np.clip(self._world.goal - point, -REACH, REACH)
                action[GRIPPER] = 1
            else:
                action[JOINTS] = point + np.clip(self._world.goal - point, -REACH, REACH) - start
            point = (
                point + np.clip(action[:2], -REACH, REACH) if benchmark.layout == "plain" else start + action[JOINTS]
            )
        active = np.abs(actions).max(0) > 0
        return ActionChunk(actions, actions, active, "point", length, observation.timestamp_s)


def a_run(**changed: Any) -> Run:
    """What a folder of results may begin with."""
    content: dict[str, Any] = {
        "benchmark": "point",
        "protocol": {"horizon": 40},
        "versions": {"point": "1.0"},
        "policy": {"title": "expert", "kind": "expert", "checkpoint": None},
        "execution": {"rate_hz": 20.0, "execute": 4, "trigger": "execute", "margin": 0, "max_prefix": 6, "seed": 0},
        "code": {"version": "0", "commit": None},
        "machine": {"processor": "abacus", "gpu": None},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Run(**content | changed)


def an_episode(**changed: Any) -> Episode:
    """One that succeeded."""
    content: dict[str, Any] = {
        "suite": "near",
        "task": 0,
        "name": "near 0",
        "trial": 0,
        "seed": 0,
        "mode": "sync",
        "delay_steps": 0.0,
        "success": True,
        "solved": 1,
        "rollouts": 1,
        "steps": 7,
        "calls": 2,
        "latency_ms": {"p50": 1.0, "p99": 2.0},
        "reaction_ms": {"p50": 50.0, "p99": 150.0},
        "wall_s": 0.1,
    }
    return Episode(**content | changed)


def as_line(episode: Episode) -> dict[str, Any]:
    """What is compared of two runs of a trial: all but what the machine's speed decides."""
    return {name: value for name, value in asdict(episode).items() if name not in ("latency_ms", "wall_s", "repeats")}
