"""Cameras and joints each tick on their own: put together what belongs together in time (spec section 4.3)."""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xr0_engine.executor.interfaces import Mistimed, SensorsNotReady, Snapshot
from xr0_engine.robot.layouts import Pose
from xr0_engine.types import Observation, RobotInfo

# Half a second of a 60 Hz camera, or of a state at 60 Hz; older samples could only make stale observations.
KEPT_FRAMES = 30
KEPT_STATES = 400
# Two clocks on one machine agree this well; a sample from further ahead has a wrong time stamp.
FUTURE_TOLERANCE_S = 0.02
# Slower than any camera and the way from it: what is older is stamped by another clock, or its sensor has stopped.
OLDEST_S = 10.0


def check_time(what: str, time_s: float, now_s: float, oldest_s: float = OLDEST_S) -> None:
    """Raises Mistimed, with both times, if at now_s nothing can be stamped time_s."""
    ahead_s = time_s - now_s
    if -oldest_s <= ahead_s <= FUTURE_TOLERANCE_S:
        return
    way = f"{ahead_s:.3f} s ahead of" if ahead_s > 0 else f"{-ahead_s:.3f} s behind"
    raise Mistimed(
        f"{what} is stamped {time_s:.3f} s, {way} the executor's clock, which says {now_s:.3f} s: stamp it, in "
        "seconds, with the clock that the executor is given; SystemClock is time.monotonic()"
        + ("" if ahead_s > 0 else ", and see that the sensor has not stopped")
    )


@dataclass(order=True)
class _Sample:
    time_s: float
    value: Any = field(compare=False)


class Synchronizer:
    """Takes samples from any thread and in any order; gives the newest observation whose parts are close in time.

    views: keys of the cameras, all required. max_age_s: how old an observation may be. max_skew_s: how far apart in
    time its parts may be. robot: as the policy tells it; where its views are videos, and its states several, an
    observation holds those of the control steps before it, the oldest again where the episode is younger. counts:
    samples that were `reordered` (came after a newer one), `duplicate` (same time stamp, the first one stays) or from
    the `future` (refused).
    """

    def __init__(
        self,
        views: Sequence[str],
        instruction: str,
        robot_type: str | None,
        max_age_s: float = 0.15,
        max_skew_s: float = 0.05,
        robot: RobotInfo | None = None,
    ) -> None:
        self.instruction = instruction
        self.counts: Counter[str] = Counter()
        self._robot_type = robot_type
        self._max_age_s, self._max_skew_s = max_age_s, max_skew_s
        self._frames: dict[str, list[_Sample]] = {view: [] for view in views}
        self._states: list[_Sample] = []
        self._ages_s = {name: _ages_s(robot, name) for name in (*views, "state")}
        # Sensors of which samples were dropped since the last reset: their oldest is not the episode's first.
        self._dropped: set[str] = set()
        # Sensor -> the time of its last sample that was refused for being from the future.
        self._refused_s: dict[str, float] = {}
        self._lock = threading.Lock()

    def add_frame(self, view: str, time_s: float, image: np.ndarray) -> None:
        """One image, (H, W, 3) uint8, and when it was taken. It is kept, not copied. Raises ValueError
        for another view."""
        if view not in self._frames:
            raise ValueError(f"view: expected one of {', '.join(self._frames)}, got {view!r}")
        self._add(view, self._frames[view], _Sample(time_s, image), KEPT_FRAMES)

    def add_state(self, time_s: float, state: np.ndarray | Pose) -> None:
        """The proprio state (S,) as the model takes it, or the pose that chunks are anchored at, which gives it."""
        self._add("state", self._states, _Sample(time_s, state), KEPT_STATES)

    def reset(self, instruction: str | None = None) -> None:
        """Before the next episode: forget all samples, so that no video shows the one before. instruction: None keeps
        it."""
        with self._lock:
            for kept in (*self._frames.values(), self._states):
                kept.clear()
            self._dropped.clear()
            self.instruction = self.instruction if instruction is None else instruction

    def observe(self, now_s: float) -> Snapshot:
        """The observation at the newest time that every camera has reached; of each, the sample nearest to that time.

        Raises SensorsNotReady that names what is missing, too old or too far apart, Mistimed (which is one) where that
        comes of another clock.
        """
        with self._lock:
            self._drop_future(now_s)
            samples = {**self._frames, "state": self._states}
            missing = [name for name, kept in samples.items() if not kept]
            for name in missing:
                check_time(name, self._refused_s.get(name, now_s), now_s, math.inf)
            if missing:
                raise SensorsNotReady(f"nothing yet from {', '.join(missing)}")
            slowest = min(self._frames, key=lambda view: self._frames[view][-1].time_s)
            time_s = self._frames[slowest][-1].time_s
            nearest = {name: _nearest(kept, time_s) for name, kept in samples.items()}
            past = {name: self._past(name, kept, nearest[name]) for name, kept in samples.items()}
        check_time(slowest, time_s, now_s, max(OLDEST_S, self._max_age_s))
        if now_s - time_s > self._max_age_s:
            raise SensorsNotReady(f"{slowest} is {now_s - time_s:.3f} s old, more than {self._max_age_s:g}")
        for name, sample in nearest.items():
            skew_s = abs(sample.time_s - time_s)
            if skew_s > self._max_skew_s:
                raise SensorsNotReady(f"{name} is {skew_s:.3f} s from the others, more than {self._max_skew_s:g}")
        state = nearest.pop("state").value
        origin = state if isinstance(state, Pose) else None
        states = [each.state() if isinstance(each, Pose) else each for each in past.pop("state")]
        observation = Observation(
            images={view: frames[0] if len(frames) == 1 else np.stack(frames) for view, frames in past.items()},
            instruction=self.instruction,
            state=states[0] if len(states) == 1 else np.concatenate([np.atleast_2d(each) for each in states]),
            robot_type=self._robot_type,
            timestamp_s=time_s,
        )
        return Snapshot(observation, origin)

    def _past(self, name: str, kept: list[_Sample], newest: _Sample) -> list[Any]:
        """What a sensor gave at the control steps that the policy sees, the oldest first. Raises SensorsNotReady."""
        found = []
        for age_s in self._ages_s[name][:-1]:
            time_s = newest.time_s - age_s
            sample = kept[0]
            if time_s > sample.time_s or name in self._dropped:
                sample = _nearest(kept, time_s)
                gap_s = abs(sample.time_s - time_s)
                if gap_s > self._max_skew_s:
                    raise SensorsNotReady(
                        f"{name} has nothing of {age_s:.3f} s before; the nearest is {gap_s:.3f} s from it, more than "
                        f"{self._max_skew_s:g}"
                    )
            found.append(sample.value)
        return [*found, newest.value]

    def _add(self, name: str, kept: list[_Sample], sample: _Sample, most: int) -> None:
        with self._lock:
            if kept and sample.time_s < kept[-1].time_s:
                self.counts["reordered"] += 1
            index = bisect_left(kept, sample)
            if index < len(kept) and kept[index].time_s == sample.time_s:
                self.counts["duplicate"] += 1
                return
            insort(kept, sample)
            drop = len(kept) - most
            if (reach_s := self._ages_s[name][0]) > 0:
                # What videos reach back to stays, whatever the sensor's rate.
                begin_s = kept[-1].time_s - reach_s - self._max_age_s - 2 * self._max_skew_s
                drop = min(drop, bisect_left(kept, _Sample(begin_s, None)))
            if drop > 0:
                del kept[:drop]
                self._dropped.add(name)

    def _drop_future(self, now_s: float) -> None:
        # After a clock went backwards, samples from before would be the newest for ever.
        for name, kept in {**self._frames, "state": self._states}.items():
            while kept and kept[-1].time_s > now_s + FUTURE_TOLERANCE_S:
                self._refused_s[name] = kept.pop().time_s
                self.counts["future"] += 1


def _ages_s(robot: RobotInfo | None, name: str) -> list[float]:
    """How much older than an observation the samples are that a policy sees of a sensor; the last is 0."""
    if robot is None:
        return [0.0]
    frames = robot.history[0] if robot.history else 1
    count = frames if name != "state" else robot.state_length or 1
    step_s = robot.past_stride / robot.control_rate_hz
    return [step_s * before for before in reversed(range(count))]


def _nearest(kept: list[_Sample], time_s: float) -> _Sample:
    return min(kept, key=lambda sample: abs(sample.time_s - time_s))
