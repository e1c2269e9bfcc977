"""Policies and robots whose every action can be told apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from xr0_engine.executor import Executor, PlainFrame, SensorsNotReady, Settings, Snapshot, VirtualClock
from xr0_engine.types import ActionChunk, Observation

RATE_HZ = 30.0
# Column GRIP, which the policies here leave at 0, has nothing between its values.
STEP, CALL, GRIP = 0, 1, 2
WIDTH = 3


def make_chunk(actions, prefix=None):
    actions = np.array(actions, np.float32)
    if prefix is not None:
        actions[: len(prefix)] = prefix
    return ActionChunk(actions, actions, np.ones(actions.shape[1], bool), "robot", 0 if prefix is None else len(prefix))


class MarkedPolicy:
    """Column STEP: the step that the action is for; column CALL: which call gave it. faults: call -> exception, or a
    function of the chunk."""

    def __init__(self, length=30, rate_hz=RATE_HZ, faults=None):
        self.length, self.rate_hz, self.faults = length, rate_hz, faults or {}
        self.calls = []

    def infer(self, observation, prefix=None):
        self.calls.append((observation, prefix))
        first = round(observation.timestamp_s * self.rate_hz)
        actions = np.zeros((self.length, WIDTH))
        actions[:, STEP] = first + np.arange(self.length)
        actions[:, CALL] = len(self.calls)
        chunk = make_chunk(actions, prefix)
        fault = self.faults.get(len(self.calls))
        if isinstance(fault, Exception):
            raise fault
        return fault(chunk) if fault else chunk


class GuidedPolicy(MarkedPolicy):
    """Keeps its guides."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.guides = []

    def infer(self, observation, prefix=None, *, guide):
        self.guides.append(guide)
        return super().infer(observation, prefix)


class MarkedRobot:
    """Keeps every command and when it came. blind: times (begin, end) at which there is no observation."""

    def __init__(self, clock, blind=(), on_command=None, age_s=0.0):
        self.clock, self.blind, self.on_command, self.age_s = clock, blind, on_command, age_s
        self.times, self.rows, self.stops = [], [], 0

    def observe(self, now_s):
        if any(begin <= now_s < end for begin, end in self.blind):
            raise SensorsNotReady("the camera is dark")
        return Snapshot(Observation({}, "go", np.zeros(3, np.float32), "robot", now_s - self.age_s))

    def command(self, row):
        self.times.append(self.clock.now())
        self.rows.append(row.copy())
        if self.on_command:
            self.on_command(len(self.rows))

    def stop(self):
        self.stops += 1

    @property
    def steps(self):
        """The step at which each command came."""
        return np.floor(np.array(self.times) * RATE_HZ + 1e-6).astype(int)

    def column(self, column):
        return np.array(self.rows)[:, column]


def execute(
    mode="async",
    delay_steps=3.0,
    seconds=4.0,
    policy=None,
    robot=None,
    clock=None,
    limits=None,
    recorder=None,
    **settings,
):
    """Run in virtual time. delay_steps: a number, or a function of the request's number."""
    clock = clock or VirtualClock(100.0)
    policy = policy or MarkedPolicy()
    robot = robot or MarkedRobot(clock)
    delay = delay_steps if callable(delay_steps) else lambda _: delay_steps
    executor = Executor(
        policy,
        robot,
        PlainFrame(WIDTH, (), [GRIP]),
        Settings(**{"rate_hz": RATE_HZ, "mode": mode, **settings}),
        limits,
        clock,
        delay_s=lambda number: delay(number) / RATE_HZ,
        recorder=recorder,
    )
    return executor.run(seconds), robot, policy


def assert_adds_up(report, policy_length=30):
    """Every action of every accepted chunk, and every inference, is counted exactly once."""
    c = report.counts
    kinds = ("executed", "late", "committed", "replaced", "skipped", "discarded", "unused", "left")
    assert c["chunks"] * policy_length == sum(c[kind] for kind in kinds), dict(c)
    assert c["inferences"] == sum(c[kind] for kind in ("chunks", "failed", "rejected", "void", "open")), dict(c)
    assert c["open"] <= 1


def with_actions(change):
    """A fault for MarkedPolicy: other actions than it would give."""

    def fault(chunk):
        actions = chunk.actions.copy()
        return replace(chunk, actions=change(actions))

    return fault
