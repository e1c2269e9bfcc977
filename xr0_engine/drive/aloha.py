"""The ALOHA simulation as a robot for the executor: in simulated time, or in real time with its own cameras."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import TracebackType

import numpy as np

from xr0_engine.executor import Clock, Limits, Snapshot, Synchronizer
from xr0_engine.robot.decode import BIMANUAL_COLUMNS
from xr0_engine.sim import CONTROL_RATE_HZ, ROBOT_TYPE, AlohaEnv, columns_to_joints, joints_to_columns

# About what the arms' servos do.
JOINT_VELOCITY_RAD_S = math.pi
# Rounding of times may not cost a tick.
ROUNDING_TICKS = 1e-3
# A camera here is as slow as this machine draws.
MAX_FRAME_AGE_S = 0.5


def aloha_limits(env: AlohaEnv) -> Limits:
    """The simulator's ranges, and a speed for the joints; grippers may open at once."""
    ranges = joints_to_columns(env.limits.T)
    used = joints_to_columns(np.ones(len(env.limits))) > 0
    joints = joints_to_columns(np.tile([1.0] * 6 + [0.0], 2)) > 0
    return Limits(
        low=np.where(used, ranges[0], -np.inf),
        high=np.where(used, ranges[1], np.inf),
        velocity=np.where(joints, JOINT_VELOCITY_RAD_S, np.inf),
        jump=np.full(BIMANUAL_COLUMNS, np.inf),
    )


class SimulatedAloha:
    """A Robot in simulated time: the physics is as far as the clock whenever somebody looks. Images are drawn at once.

    env: freshly reset; time 0 of its episode is when the robot is made. The clock must pass through every tick of
    30 Hz, as it does at a control rate of 30 Hz: each command is held from its tick to the next.
    """

    def __init__(self, env: AlohaEnv, clock: Clock, instruction: str) -> None:
        self._env, self._clock, self._instruction = env, clock, instruction
        self._begin_s, self._ticks = clock.now(), 0
        self._targets = env.joints

    def observe(self, now_s: float) -> Snapshot:
        self._catch_up()
        observation = replace(self._env.observe(self._instruction), timestamp_s=now_s)
        return Snapshot(observation, self._env.pose)

    def command(self, row: np.ndarray) -> None:
        self._catch_up()
        self._targets = columns_to_joints(row)

    def stop(self) -> None:
        self._catch_up()
        self._targets = self._env.joints

    def _catch_up(self) -> None:
        due = math.floor((self._clock.now() - self._begin_s) * CONTROL_RATE_HZ + ROUNDING_TICKS)
        for _ in range(self._ticks, due):
            self._env.step(self._targets)
        self._ticks = max(self._ticks, due)


class LiveAloha(SimulatedAloha):
    """The same in real time: a thread draws what its cameras see, over and over, as fast as the machine can.

    Use it as a context manager. Observations are put together from frames and poses that are close in time. Both are
    taken when the executor calls, which has the physics to itself.
    """

    def __init__(self, env: AlohaEnv, clock: Clock, instruction: str) -> None:
        super().__init__(env, clock, instruction)
        self.sensors = Synchronizer(env.views, instruction, ROBOT_TYPE, max_age_s=MAX_FRAME_AGE_S)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._look()
        self._cameras = threading.Thread(target=self._draw, name="xr0-cameras", daemon=True)

    def observe(self, now_s: float) -> Snapshot:
        self._catch_up()
        self._look()
        return self.sensors.observe(now_s)

    def command(self, row: np.ndarray) -> None:
        super().command(row)
        self._look()

    def __enter__(self) -> LiveAloha:
        self._cameras.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closed.set()
        self._cameras.join()

    def _look(self) -> None:
        """Note the arms' pose, and for the cameras all that moves."""
        scene = self._clock.now(), self._env.physics.data.qpos.copy()
        self.sensors.add_state(scene[0], self._env.pose)
        with self._lock:
            self._scene = scene

    def _draw(self) -> None:
        # A simulator of its own: drawing takes longer than a tick and must happen in the thread that began it.
        with AlohaEnv(width=self._env.width, height=self._env.height, views=self._env.views) as eyes:
            while not self._closed.is_set():
                with self._lock:
                    time_s, positions = self._scene
                with eyes.physics.reset_context():
                    eyes.physics.data.qpos[:] = positions
                for view, image in eyes.observe(self._instruction).images.items():
                    self.sensors.add_frame(view, time_s, image)
