"""Acting a trial out: the executor drives a world on a clock of its own, on which a control step passes with each tick.

The world moves on while the policy thinks, for as many steps as the trial says, whatever the machine's speed. Mode sync
without a delay is the plain loop of released evaluations: look, infer, execute, look again.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from xr0_engine.evaluation.benchmark import Episode, ShowsViews, Trial, World
from xr0_engine.executor import Executor, Frame, Notes, Recorder, Report, Settings, Snapshot, VirtualClock, frame_for
from xr0_engine.executor.fit import check_fit
from xr0_engine.robot.history import History
from xr0_engine.serve.protocol import Busy
from xr0_engine.types import ActionChunk, Guide, Observation, RobotInfo

EXECUTOR_MODES: Mapping[str, Literal["sync", "async", "naive_async", "guided"]] = {
    "sync": "sync",
    "naive": "naive_async",
    "async": "async",
    "guided": "guided",
}
PICTURE_EVERY = 4
"""Control steps from one picture of a video to the next."""


class Actor(Protocol):
    """A policy as episodes ask it: with the noise that is theirs. For mode guided see GuidedActor."""

    def infer(self, observation: Observation, prefix: np.ndarray | None, seed: int) -> ActionChunk:
        """As Engine.infer and Client.infer. seed: for policies that draw noise."""

    def robot_info(self, robot_type: str | None = None) -> RobotInfo: ...


class GuidedActor(Actor, Protocol):
    """An Actor for mode guided."""

    def infer(
        self, observation: Observation, prefix: np.ndarray | None, seed: int, guide: Guide | None = None
    ) -> ActionChunk: ...


class Interrupted(Exception):
    """The policy's server went away, or would not answer now: it says nothing of the policy, the trial is repeated."""


class Unfit(ValueError):
    """The policy cannot be executed so, in no trial."""


@dataclass(frozen=True)
class Execution:
    """How chunks are executed, the same for all trials of a run.

    rate_hz: control steps per second. execute: actions of each chunk that mode sync executes. trigger: when the modes
    but sync infer: `execute` starts an inference every `execute` actions, or earlier where the delay takes it so
    that actions never run out; a number or `deadline` is as in the executor's Settings. margin: steps that a prefix is
    longer than the delay. max_prefix: None takes the policy's. seed: of the noise and of what a benchmark draws.
    """

    rate_hz: float
    execute: int
    trigger: int | Literal["execute", "deadline"] = "execute"
    margin: int = 0
    max_prefix: int | None = None
    seed: int = 0

    def settings(self, trial: Trial, info: RobotInfo) -> Settings:
        """For a trial, of a policy that tells info. Raises ValueError that names what does not fit."""
        delay_steps = delay_of(trial)
        in_time = max(info.chunk_length - self.execute, math.ceil(delay_steps), 1)
        settings = Settings(
            rate_hz=self.rate_hz,
            mode=EXECUTOR_MODES[trial.mode],
            trigger=in_time if self.trigger == "execute" else self.trigger,
            execute=self.execute if trial.mode == "sync" else None,
            margin=self.margin,
            max_prefix=longest_prefix(info) if self.max_prefix is None else self.max_prefix,
            expected_delay_s=delay_steps / self.rate_hz,
            # On this clock an inference takes as long as it is told to.
            hang_s=math.inf,
        )
        check_fit(info, None, settings, frame_for(info))
        return settings

    def as_json(self) -> dict[str, Any]:
        """For Run.execution."""
        return asdict(self)


def longest_prefix(info: RobotInfo) -> int:
    """That a policy takes, in actions."""
    return info.chunk_length - 1 if info.max_prefix is None else min(info.max_prefix, info.chunk_length - 1)


def delay_of(trial: Trial) -> float:
    """Control steps from an observation to the first action that comes of it.

    In the modes but sync the executor looks when it has given a step's command, so one is the least.
    """
    return trial.delay_steps if trial.mode == "sync" else max(trial.delay_steps, 1)


def noise_seed(trial: Trial, call: int) -> int:
    """The noise of a trial's call number `call`: the same in each mode and delay, on each machine. Below 2**56."""
    identity = [trial.seed, trial.task.suite, trial.task.index, trial.number, call]
    return int.from_bytes(hashlib.sha256(json.dumps(identity).encode()).digest()[:7], "big")


def act(
    world: World,
    begin: Callable[[World], Actor],
    trial: Trial,
    execution: Execution,
    robot_type: str | None = None,
    film: Callable[[np.ndarray], None] | None = None,
    beat: Callable[[], None] = lambda: None,
    note: Callable[[str, Mapping[str, Any]], None] | None = None,
    watch: Notes | None = None,
) -> Episode:
    """Act a trial out. Its video and repeats are the caller's to tell.

    begin: the policy at the beginning of each rollout. robot_type: the policy's name for the robot. film: takes a
    picture, (height, width, 3) uint8, at every PICTURE_EVERY-th step and at each rollout's end. beat: called whenever
    something goes on. note: takes the kind and the fields of each line that a recording of the trial would have
    (executor/recording.py). watch: is told the same, and what the policy saw.

    What the world raises, or the policy but for its server's absence, is the episode's error. Raises Interrupted;
    PermissionError of a server; Unfit, a ValueError, for a policy that cannot be executed so.
    """
    policy = _EpisodePolicy(trial, robot_type, beat)
    notes = _Notes(note, watch)
    started, rollouts, solved, steps = time.perf_counter(), 0, 0, 0
    rollout: _Rollout | None = None
    error = None
    try:
        beat()
        world.reset(trial)
        goes_on = True
        while goes_on:
            policy.actor = begin(world)
            info = policy.actor.robot_info(robot_type)
            rollouts += 1
            if isinstance(world, ShowsViews):
                world.show(info.views)
            rollout = _Rollout(world, policy, notes, film, beat, _history_of(info))
            solved += rollout.run(_settings(execution, trial, info), frame_for(info), delay_of(trial))
            steps, rollout = steps + rollout.steps, None
            goes_on = world.proceed()
            beat()
    except Unfit:
        raise
    # A trial that raises is a failure, whatever it raises: so the released evaluations have it.
    except Exception as failure:
        steps += rollout.steps if rollout else 0
        if isinstance(policy.error, ConnectionError | TimeoutError | Busy):
            raise Interrupted(str(policy.error) or type(policy.error).__name__) from None
        if isinstance(policy.error, PermissionError):
            raise policy.error from None
        if trial.mode == "guided" and policy.error is not None and len(policy.latencies_ms) == 1:
            # The first guide is empty: what refuses it takes none.
            raise Unfit(f"mode guided: {policy.error}") from None
        source = "policy" if failure is policy.error or isinstance(failure, _Rejected) else "world"
        error = f"{source}, rollout {rollouts}, step {steps}: {_told(failure)}"
    return Episode.of(
        trial,
        success=error is None and solved == rollouts,
        solved=solved,
        rollouts=rollouts,
        steps=steps,
        calls=len(policy.latencies_ms),
        latency_ms=_percentiles(policy.latencies_ms),
        reaction_ms=_percentiles(notes.reactions_ms),
        wall_s=round(time.perf_counter() - started, 3),
        error=error,
        facts=dict(world.facts()) if error is None else {},
    )


class _RolloutOver(Exception):
    """The goal or the horizon is reached."""


class _Rejected(Exception):
    """The executor refused a chunk."""


class _EpisodePolicy:
    """The policy as the executor asks it; what it raises ends the episode, which the executor would try again."""

    actor: Actor

    def __init__(self, trial: Trial, robot_type: str | None, beat: Callable[[], None]) -> None:
        self._trial, self._robot_type, self._beat = trial, robot_type, beat
        self.latencies_ms: list[float] = []
        self.error: Exception | None = None

    def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, guide: Guide | None = None
    ) -> ActionChunk:
        seed = noise_seed(self._trial, len(self.latencies_ms))
        if self._robot_type is not None:
            observation = replace(observation, robot_type=self._robot_type)
        start = time.perf_counter()
        try:
            if guide is None:
                return self.actor.infer(observation, prefix, seed)
            return cast(GuidedActor, self.actor).infer(observation, None, seed, guide)
        # Kept for the world's clock, which raises it.
        except Exception as error:
            self.error = error
            raise
        finally:
            self.latencies_ms.append(round(1e3 * (time.perf_counter() - start), 3))
            self._beat()


class _Notes(Recorder):
    """Keeps what a recording would say of when an action was chosen, in memory."""

    def __init__(self, note: Callable[[str, Mapping[str, Any]], None] | None, watch: Notes | None = None) -> None:
        self.title, self._note, self._watch = "", note, watch
        self.reactions_ms: list[float] = []
        self._observed_s: dict[int, float] = {}

    def write(self, kind: str, **fields: Any) -> None:
        if self._note is not None:
            self._note(kind, fields)
        if self._watch is not None:
            self._watch.write(kind, **fields)
        if kind == "session":
            self._observed_s = {}
        elif kind == "inference":
            self._observed_s[fields["number"]] = fields["observed_s"]
        # The executor names the chunk that first gave the action: a prefix stays its predecessor's.
        elif kind == "step" and fields["source"] == "chunk":
            self.reactions_ms.append(round(1e3 * (fields["time_s"] - self._observed_s[fields["chunk"]]), 3))

    def saw(self, number: int, observation: Observation) -> None:
        if self._watch is not None:
            self._watch.saw(number, observation)


class _WorldClock(VirtualClock):
    """Time that passes by control steps of the world."""

    def __init__(self, pass_step: Callable[[], None]) -> None:
        super().__init__()
        self._pass_step = pass_step

    def sleep_until(self, time_s: float) -> None:
        # The executor waits from one tick to the next, and a tick is a control step.
        self._pass_step()
        super().sleep_until(time_s)


class _Rollout:
    """The world as the executor's robot."""

    def __init__(
        self,
        world: World,
        policy: _EpisodePolicy,
        notes: _Notes,
        film: Callable[[np.ndarray], None] | None,
        beat: Callable[[], None],
        history: History | None = None,
    ) -> None:
        self._world, self._policy, self._notes, self._film, self._beat = world, policy, notes, film, beat
        # What the policy sees of the past: the world is looked at in every step, those that execute a chunk included.
        self._history, self._seen = history, -1
        self.steps = 0
        self._row: np.ndarray | None = None
        self._report: Report | None = None

    def run(self, settings: Settings, frame: Frame, delay_steps: float) -> bool:
        """Until the goal or the horizon is reached; whether it is the goal."""
        self._horizon, self._success = self._world.horizon, False
        self._rest = rest(self._world, frame)
        clock = _WorldClock(self._pass_step)
        delay_s = delay_steps / settings.rate_hz
        executor = Executor(self._policy, self, frame, settings, None, clock, lambda number: delay_s, self._notes)
        self._report = executor.report
        try:
            # One tick more than there are steps: it is the horizon that ends the rollout.
            executor.run((self._horizon + 1) / settings.rate_hz)
        except _RolloutOver:
            return self._success
        raise AssertionError("a rollout ends by its goal or its horizon")

    def observe(self, now_s: float) -> Snapshot:
        self._beat()
        if self._history is None:
            observation = self._world.observe()
        else:
            self._look(self._history)
            observation = self._history.observe()
        return Snapshot(replace(observation, timestamp_s=now_s), self._world.pose())

    def _look(self, history: History) -> None:
        if self._seen != self.steps:
            history.push(self._world.observe())
            self._seen = self.steps

    def command(self, row: np.ndarray) -> None:
        self._row = row

    def stop(self) -> None: ...

    def _pass_step(self) -> None:
        if self._policy.error is not None:
            raise self._policy.error
        if self._report is not None and self._report.counts["rejected"]:
            raise _Rejected(self._report.last_error)
        if self._film is not None and self.steps % PICTURE_EVERY == 0:
            self._film(self._world.picture())
        self._beat()
        self._world.step(self._rest if self._row is None else self._row)
        self.steps += 1
        self._success = bool(self._world.success)
        if self._success or self.steps >= self._horizon:
            if self._film is not None:
                self._film(self._world.picture())
            raise _RolloutOver
        if self._history is not None:
            self._look(self._history)


def _history_of(info: RobotInfo) -> History | None:
    """Of a policy that sees the past; begun anew in each rollout."""
    return None if info.history is None and info.state_length is None else History.of(info)


def _settings(execution: Execution, trial: Trial, info: RobotInfo) -> Settings:
    try:
        return execution.settings(trial, info)
    except ValueError as reason:
        raise Unfit(str(reason)) from None


def rest(world: World, frame: Frame) -> np.ndarray:
    """(A,) float64, a command before any other that stands still: where the robot is, or what the world calls rest."""
    row = frame.start(world.pose())
    if row is None:
        row = np.zeros(frame.width)
        still = world.rest()
        if still is not None:
            row[: len(still)] = still
    return row


def _percentiles(times_ms: list[float]) -> dict[str, float]:
    if not times_ms:
        return {}
    return {name: round(float(np.percentile(times_ms, percent)), 3) for name, percent in (("p50", 50), ("p99", 99))}


def _told(failure: Exception) -> str:
    """What was raised, and where."""
    frames = traceback.extract_tb(failure.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(failure).__name__}: {failure}{where}"
