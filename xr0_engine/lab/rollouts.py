"""Many closed-loop trials at once: each is acted out as `xr0 eval` does, their inferences meet and make batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.evaluation.benchmark import Episode, Mode, Task, Trial, World
from xr0_engine.evaluation.episode import Actor, Execution, act
from xr0_engine.lab.benchmark import Event, PointBenchmark, PointWorld
from xr0_engine.lab.experts import PointExpert
from xr0_engine.lab.tasks import find_task
from xr0_engine.types import ActionChunk, Guide, Observation, RobotInfo

if TYPE_CHECKING:
    from xr0_engine.engine import Engine

TOGETHER = 256
"""Trials that are acted out at once, a thread each."""
BATCH = 64
"""Observations that are inferred at once, at most."""


@dataclass(frozen=True, eq=False)
class Call:
    """An inference. number: from 1 in its trial. observed_step: that its observation, and its first action, belongs to.
    prefix_length: its actions that were given. takeover: the first step that it decided; None if it came too late, or
    the trial ended before. chunk: (T, C) float64, its actions as Rollout.actions; in mode sync those that are executed.
    """

    number: int
    observed_step: int
    prefix_length: int
    takeover: int | None
    chunk: np.ndarray


@dataclass(frozen=True, eq=False)
class Rollout:
    """What happened in a trial of N control steps, of R robots with C = 2 R columns.

    actions: (N, C) float64, what was commanded: velocities in units a step, or places. chunks: (N,) int64, the number
    of the inference that chose it, 0 for none (at rest, held); indices: (N,) int64, its place in that chunk, else -1.
    positions, velocities, goals: (N + 1, R, 2), before each step and after the last.
    """

    trial: Trial
    episode: Episode
    actions: np.ndarray
    chunks: np.ndarray
    indices: np.ndarray
    positions: np.ndarray
    velocities: np.ndarray
    goals: np.ndarray
    events: tuple[Event, ...]
    calls: tuple[Call, ...]

    @property
    def seams(self) -> np.ndarray:
        """(n,) the steps whose action another chunk chose than that of the step before: none where it held between."""
        before, after = self.chunks[:-1], self.chunks[1:]
        return 1 + np.flatnonzero((before > 0) & (after > 0) & (before != after))


def trials(benchmark: PointBenchmark, count: int, mode: Mode, delay_steps: float, seed: int = 0) -> list[Trial]:
    """The first `count` of a benchmark's one task."""
    (tasks,) = benchmark.suites().values()
    task: Task = tasks[0]
    return [Trial(task, number, seed, mode, delay_steps) for number in range(count)]


def roll_out(
    engine: Engine | None,
    benchmark: PointBenchmark,
    chosen: Sequence[Trial],
    execution: Execution | None = None,
    batch: int = BATCH,
) -> list[Rollout]:
    """Act trials out, in their order. engine: None is the expert. execution: None is the benchmark's own.

    Trials go on in step with each other: whenever all of them wait for an inference, their observations are inferred in
    the order of the trials, at most `batch` at once. So the same call gives the same rollouts. Raises RuntimeError if a
    trial ended by an error, ValueError as act.
    """
    execution = execution or Execution(benchmark.rate_hz, benchmark.execute)
    done: list[Rollout] = []
    for begin in range(0, len(chosen), TOGETHER):
        done += _Company(engine, benchmark, chosen[begin : begin + TOGETHER], execution, batch).run()
    return done


@dataclass(frozen=True, eq=False)
class _Question:
    """What trial number `place` asks, and where the answer goes: a chunk, or what was raised."""

    place: int
    observation: Observation
    prefix: np.ndarray | None
    seed: int
    guide: Guide | None
    answer: queue.SimpleQueue[ActionChunk | BaseException]


class _Company:
    """Trials that are acted out together. Arguments as of roll_out."""

    def __init__(
        self,
        engine: Engine | None,
        benchmark: PointBenchmark,
        chosen: Sequence[Trial],
        execution: Execution,
        batch: int,
    ) -> None:
        self._engine, self._benchmark, self._batch = engine, benchmark, batch
        self._trials, self._execution = chosen, execution
        # A question, or the place of a trial that has ended.
        self._heard: queue.SimpleQueue[_Question | int] = queue.SimpleQueue()
        self._done: dict[int, Rollout | BaseException] = {}

    def run(self) -> list[Rollout]:
        if self._engine is None:
            return [self._act(place) for place in range(len(self._trials))]
        threads = [
            threading.Thread(target=self._work, args=(place,), name=f"xr0-trial-{place}", daemon=True)
            for place in range(len(self._trials))
        ]
        for thread in threads:
            thread.start()
        acting, waiting = len(threads), list[_Question]()
        while acting:
            heard = self._heard.get()
            if isinstance(heard, int):
                acting -= 1
            else:
                waiting.append(heard)
            if waiting and len(waiting) == acting:
                self._answer(self._engine, sorted(waiting, key=lambda question: question.place))
                waiting = []
        for thread in threads:
            thread.join()
        return [self._rollout(place) for place in range(len(threads))]

    def _rollout(self, place: int) -> Rollout:
        done = self._done[place]
        if isinstance(done, BaseException):
            raise done
        return done

    def _work(self, place: int) -> None:
        try:
            self._done[place] = self._act(place)
        # Raised again where the results are collected.
        except BaseException as error:
            self._done[place] = error
        finally:
            self._heard.put(place)

    def _answer(self, engine: Engine, questions: Sequence[_Question]) -> None:
        for begin in range(0, len(questions), self._batch):
            some = questions[begin : begin + self._batch]
            try:
                answers: Sequence[ActionChunk | BaseException] = engine.infer(
                    [question.observation for question in some],
                    [question.prefix for question in some],
                    seed=[question.seed for question in some],
                    guide=None if some[0].guide is None else [question.guide for question in some],
                )
            # Each of the trials that asked ends by it.
            except (ValueError, RuntimeError, NotImplementedError) as error:
                answers = [error] * len(some)
            for question, answer in zip(some, answers, strict=True):
                question.answer.put(answer)

    def _act(self, place: int) -> Rollout:
        trial = self._trials[place]
        world, notes = self._benchmark.open(), _Notes()

        def begin(own: World) -> Actor:
            if self._engine is None:
                return _Alone(PointExpert(world.env, world.seed))
            return _Asking(self._engine, self._benchmark.robot_type, place, self._heard)

        episode = act(world, begin, trial, self._execution, note=notes)
        if episode.error is not None:
            raise RuntimeError(f"trial {trial.key}: {episode.error}")
        return notes.rollout(trial, episode, world, find_task(self._benchmark.task).columns)


class _Asking:
    """The engine as one trial's Actor."""

    def __init__(self, engine: Engine, robot_type: str, place: int, heard: queue.SimpleQueue[_Question | int]) -> None:
        self._place, self._heard = place, heard
        self._info = engine.robot_info(robot_type)
        self._answer: queue.SimpleQueue[ActionChunk | BaseException] = queue.SimpleQueue()

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._info

    def infer(
        self, observation: Observation, prefix: np.ndarray | None, seed: int, guide: Guide | None = None
    ) -> ActionChunk:
        self._heard.put(_Question(self._place, observation, prefix, seed, guide, self._answer))
        answer = self._answer.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer


class _Alone:
    """The expert as an Actor."""

    def __init__(self, expert: PointExpert) -> None:
        self._expert = expert

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        return self._expert.robot_info(robot_type)

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        return self._expert.infer(observation, prefix)


class _Notes:
    """What the executor tells of a trial."""

    def __init__(self) -> None:
        self._calls: dict[int, Call] = {}
        self._sources: dict[int, tuple[int, int]] = {}

    def __call__(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "inference":
            number, first = fields["number"], fields["first_step"]
            self._calls[number] = Call(number, first, fields["prefix_length"], None, np.zeros((0, 0)))
        elif kind == "chunk":
            call = self._calls[fields["number"]]
            rows = np.asarray(fields["rows"], dtype=np.float64)
            self._calls[call.number] = replace(call, takeover=fields["takeover"], chunk=rows)
        elif kind == "step" and fields["source"] == "chunk":
            self._sources[fields["step"]] = fields["chunk"], fields["index"]

    def rollout(self, trial: Trial, episode: Episode, world: PointWorld, columns: Sequence[int]) -> Rollout:
        sources = [self._sources.get(step, (0, -1)) for step in range(len(world.commands))]
        return Rollout(
            trial,
            episode,
            actions=np.array(world.commands).reshape(-1, len(columns)),
            chunks=np.array([chunk for chunk, _ in sources], dtype=np.int64),
            indices=np.array([index for _, index in sources], dtype=np.int64),
            positions=np.stack(world.positions),
            velocities=np.stack(world.velocities),
            goals=np.stack(world.goals),
            events=tuple(world.events()),
            calls=tuple(
                replace(call, chunk=call.chunk[:, list(columns)] if call.chunk.size else call.chunk)
                for call in self._calls.values()
            ),
        )
