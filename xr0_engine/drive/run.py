"""One execution, put together: policy, robot, clock and limits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import cast

import numpy as np

from xr0_engine.drive.null import NullRobot
from xr0_engine.drive.policies import Source
from xr0_engine.executor import (
    Clock,
    Executor,
    GuidedPolicy,
    Limits,
    Notes,
    Report,
    Robot,
    SensorsNotReady,
    Settings,
    Snapshot,
    SystemClock,
    VirtualClock,
    Watcher,
)
from xr0_engine.guard import Guard, GuardThread
from xr0_engine.guard.thread import GuardInLoop
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.types import Guide

# (height, width) of frames, unless asked otherwise.
SIMULATION_SIZE, NULL_SIZE = (240, 320), (256, 256)
# A simulated camera has to build its scene first.
SENSORS_S = 30.0


def run(
    source: Source,
    settings: Settings,
    seconds: float,
    in_simulator: bool,
    delay_steps: float | None,
    seed: int,
    recorder: Notes | None,
    image_size: tuple[int, int] | None = None,
    guard: Guard | None = None,
    guard_stops: bool = False,
) -> Report:
    """Execute source's policy for so long, on the ALOHA simulation or on no robot at all.

    delay_steps: simulated time, in which every inference takes so many steps; None: real time, after one inference to
    warm up, whose errors are raised. seed: where the cube lies. image_size: (height, width) of the robot's frames;
    None: SIMULATION_SIZE, or NULL_SIZE without a robot. guard: looks on, in real time from a thread of its own;
    guard_stops: its first warning ends the run. Raises ValueError for a policy whose layout or control rate is
    not the simulation's.
    """
    clock: Clock = SystemClock() if delay_steps is None else VirtualClock()
    delay_s: Callable[[int], float] | None = None
    if delay_steps is not None:
        delay_s = lambda number: delay_steps / settings.rate_hz  # noqa: E731
    with ExitStack() as stack:
        robot: Robot
        limits: Limits | None
        if in_simulator:
            robot, limits = _simulation(source, clock, delay_steps is None, seed, image_size or SIMULATION_SIZE, stack)
        else:
            size = image_size or NULL_SIZE
            robot = NullRobot(
                source.views,
                source.layout,
                source.robot_type,
                source.state_width,
                size,
                source.frames,
                source.state_length,
            )
            limits = None
        if delay_s is None:
            _warm_up(source, robot, clock, settings.mode == "guided")
        watcher: Watcher | None = None
        if guard is not None:
            watcher = (GuardThread if delay_s is None else GuardInLoop)(guard, guard_stops)
        executor = Executor(source.policy, robot, source.frame, settings, limits, clock, delay_s, recorder, watcher)
        return executor.run(seconds)


def _warm_up(source: Source, robot: Robot, clock: Clock, guided: bool) -> None:
    """One inference, whose chunk nobody executes. Raises whatever the policy raises, among others for a guide."""
    observation = _wait_for_sensors(robot, clock).observation
    if guided:
        nothing = Guide(np.zeros((0, source.action_width), np.float32), 0)
        cast(GuidedPolicy, source.policy).infer(observation, guide=nothing)
    else:
        source.policy.infer(observation)
    # A simulated robot catches up with the time that this took.
    _wait_for_sensors(robot, clock)


def _wait_for_sensors(robot: Robot, clock: Clock) -> Snapshot:
    """The first observation that there is. Raises SensorsNotReady if there is none for SENSORS_S."""
    begin_s = clock.now()
    while True:
        try:
            return robot.observe(clock.now())
        except SensorsNotReady:
            if clock.now() - begin_s > SENSORS_S:
                raise
            clock.sleep_until(clock.now() + 0.01)


def _simulation(
    source: Source, clock: Clock, live: bool, seed: int, image_size: tuple[int, int], stack: ExitStack
) -> tuple[Robot, Limits]:
    from xr0_engine.drive.aloha import LiveAloha, SimulatedAloha, aloha_limits
    from xr0_engine.sim import CAMERAS, CONTROL_RATE_HZ, INSTRUCTION, AlohaEnv

    if (source.layout, source.control_rate_hz) != (BIMANUAL, CONTROL_RATE_HZ):
        raise ValueError(
            f"policy: expected layout {BIMANUAL.name} at {CONTROL_RATE_HZ:g} Hz for the simulation, "
            f"got {source.layout.name} at {source.control_rate_hz:g} Hz"
        )
    height, width = image_size
    # A policy is shown its own views and no others.
    views = [view for view in CAMERAS if view in source.views]
    env = stack.enter_context(AlohaEnv(seed, width=width, height=height, views=views or tuple(CAMERAS)))
    robot: Robot = SimulatedAloha(env, clock, INSTRUCTION)
    if live:
        robot = stack.enter_context(LiveAloha(env, clock, INSTRUCTION))
    return robot, aloha_limits(env)
