"""The robot's observations, each checked before an inference starts from it."""

from __future__ import annotations

import math

from xr0_engine.executor.clock import Clock
from xr0_engine.executor.fit import check_fit
from xr0_engine.executor.interfaces import Mistimed, Policy, Robot, SensorsNotReady, Snapshot, TellingPolicy
from xr0_engine.executor.report import Report
from xr0_engine.executor.sensors import check_time
from xr0_engine.executor.settings import Settings
from xr0_engine.robot.layouts import Frame


class Observer:
    """Asks the robot, and compares its time with the clock and what it is with the policy. Arguments as in Executor."""

    def __init__(
        self, robot: Robot, policy: Policy, settings: Settings, frame: Frame, clock: Clock, report: Report
    ) -> None:
        self._robot, self._policy, self._settings, self._frame = robot, policy, settings, frame
        self._clock, self._report = clock, report
        # Robot types that the policy tells to be driven as they are.
        self._fitting: set[str | None] = set()

    def observe(self, now_s: float) -> tuple[Snapshot, float] | None:
        """A snapshot and its time; None where no inference can start from what the robot sees: counted, and told in
        last_error.

        Raises ValueError for an observation without a time, or of a robot that the policy drives in another way.
        """
        try:
            snapshot = self._robot.observe(now_s)
            seen_s = snapshot.observation.timestamp_s
            if seen_s is None or not math.isfinite(seen_s):
                raise ValueError(f"observation.timestamp_s: expected a time on the executor's clock, got {seen_s}")
            # Time may have passed while the robot was asked: what is newer than now_s need not be of the future.
            check_time("observation.timestamp_s", seen_s, max(now_s, min(seen_s, self._clock.now())))
        except SensorsNotReady as reason:
            kind = "mistimed" if isinstance(reason, Mistimed) else "sensors"
            self._report.counts[kind] += 1
            self._report.last_error = f"{kind}: {reason}"
            return None
        robot_type = snapshot.observation.robot_type
        if robot_type not in self._fitting and isinstance(self._policy, TellingPolicy):
            check_fit(self._policy.robot_info(robot_type), robot_type, self._settings, self._frame)
            self._fitting.add(robot_type)
        return snapshot, seen_s
