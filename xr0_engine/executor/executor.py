"""The control loop: an action at every tick, whatever the policy does (spec section 5)."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from xr0_engine.executor.clock import Clock, SystemClock, short_collections
from xr0_engine.executor.delay import DelayEstimator
from xr0_engine.executor.fit import checked_rows
from xr0_engine.executor.guarding import Guarding
from xr0_engine.executor.interfaces import Policy, Robot, Snapshot, Watcher
from xr0_engine.executor.limits import Limiter, Limits
from xr0_engine.executor.observer import Observer
from xr0_engine.executor.recording import VERSION, Notes
from xr0_engine.executor.report import Report
from xr0_engine.executor.settings import Settings
from xr0_engine.executor.timeline import Timeline, coast
from xr0_engine.executor.worker import DelayedWorker, Outcome, Request, ThreadWorker, Worker
from xr0_engine.robot.layouts import Frame
from xr0_engine.types import Guide

# A tick that is due in 1e-6 periods is due: times are rounded.
ROUNDING_TICKS = 1e-6
# Ticks are at most one period ahead. Further ahead means that the clock went backwards.
JUMP_PERIODS = 2.0
# Metres or radians in a step: a robot that is told to move less stands still.
STILL = 1e-4


class Executor:
    """Executes a policy's chunks on a robot. Make a new one for each run.

    policy: called from one thread, one call at a time; if it has a robot_info, as Engine and Client do, run refuses
    settings and a frame that differ from it (ValueError). robot: called from the thread that calls run. frame: how the
    robot's actions compare. limits: applied to every command. clock: the one that observations are stamped
    with. delay_s: for simulated time: request number -> seconds that its inference shall take on the clock; inference
    then runs inside the loop. recorder: where the run is recorded: a Recorder's file, or rerun (viz.RunView). guard:
    looks at what goes through, beside the loop.

    Time is divided into steps: step n begins at n / rate_hz on the clock. A chunk's action i belongs to the step of its
    observation plus i. Raises ValueError for arguments that do not fit together.
    """

    def __init__(
        self,
        policy: Policy,
        robot: Robot,
        frame: Frame,
        settings: Settings,
        limits: Limits | None = None,
        clock: Clock | None = None,
        delay_s: Callable[[int], float] | None = None,
        recorder: Notes | None = None,
        guard: Watcher | None = None,
    ) -> None:
        if settings.commands_per_action > 1 and frame.delta.any():
            raise ValueError("commands_per_action: expected 1 for a robot with delta columns, which add up")
        self.report = Report(frame.width)
        self._robot, self._frame, self._settings, self._recorder = robot, frame, settings, recorder
        self._clock: Clock = SystemClock() if clock is None else clock
        self._limiter = Limiter(Limits.none(frame.width) if limits is None else limits, frame)
        self._worker: Worker = (
            ThreadWorker(policy, self._clock) if delay_s is None else DelayedWorker(policy, self._clock, delay_s)
        )
        self._observer = Observer(robot, policy, settings, frame, self._clock, self.report)
        self._guarding = Guarding(guard, self.report, self._record, self.end)
        self._timeline = Timeline()
        self._delay = DelayEstimator(settings.expected_delay_s)
        self._ended = threading.Event()
        self._pending: Request | None = None
        self._pending_is_void = self._pending_is_reported = False
        self._retry_s = -math.inf
        self._chunk_length: int | None = None
        # The step that is being executed, its row and the chunk that it comes from.
        self._step: int | None = None
        self._row: np.ndarray | None = None
        self._source: int | None = None
        # The first of the steps, up to now, in which the robot was told to stand still; None if it moves.
        self._still_since: int | None = None
        # What a recording says of that step.
        self._note: dict[str, Any] = {}
        # What the robot was told last, and what in the step before.
        self._told: tuple[np.ndarray, np.ndarray] | None = None
        if recorder is not None:
            run = {"settings": asdict(settings), "layout": frame.layout, "width": frame.width}
            recorder.write("session", version=VERSION, title=recorder.title, **run)

    def run(self, seconds: float) -> Report:
        """Run the loop for so long, or until end() is called; then stop the robot, also after an error or Ctrl-C.

        Raises ValueError for a time that is not above 0, or before the first command if the policy is to be driven in
        another way than settings and frame say, and whatever the robot's methods raise.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds: expected a time above 0, got {seconds}")
        try:
            with short_collections():
                self._loop(max(1, round(seconds * self._settings.loop_hz)))
        finally:
            self._robot.stop()
            self._finish()
        return self.report

    def end(self, reason: str = "asked to") -> None:
        """Make run return after the tick that it is in. From any thread."""
        if not self._ended.is_set():
            self.report.ended = reason
            self._ended.set()

    def _loop(self, ticks: int) -> None:
        loop_hz = self._settings.loop_hz
        tick = self._next_tick()
        last = tick + ticks
        while tick < last and not self._ended.is_set():
            if not self._wait(tick):
                self._clock_went_back()
                restart = self._next_tick()
                last, tick = last - tick + restart, restart
                continue
            now = self._clock.now()
            current = max(tick, math.floor(now * loop_hz + ROUNDING_TICKS))
            self.report.counts["deadline_misses"] += current - tick
            self._tick(current, now)
            tick = current + 1

    def _next_tick(self) -> int:
        return math.ceil(self._clock.now() * self._settings.loop_hz - ROUNDING_TICKS)

    def _wait(self, tick: int) -> bool:
        """Sleep until the tick; False if the clock went backwards."""
        due = tick / self._settings.loop_hz
        while (now := self._clock.now()) < due:
            if (due - now) * self._settings.loop_hz > JUMP_PERIODS:
                return False
            self._clock.sleep_until(due)
        return True

    def _tick(self, tick: int, now: float) -> None:
        if self._guarding.look():
            return
        step, phase = divmod(tick, self._settings.commands_per_action)
        is_new = step != self._step
        if is_new:
            self._begin(step, now)
        else:
            self._collect(step + 1, now)
        if self._row is not None:
            self._send(tick, step, phase, is_new)
        if self._settings.mode != "sync" and not self._ended.is_set():
            self._request(step, now)

    def _begin(self, step: int, now: float) -> None:
        """Choose the row of a new step."""
        counts = self.report.counts
        if self._step is not None and step > self._step + 1:
            counts["missed"] += step - self._step - 1
            self._record("missed", first=self._step + 1, count=step - self._step - 1)
        counts["skipped"] += self._timeline.drop_before(step)
        self._collect(step, now)
        if self._settings.mode == "sync" and not len(self._timeline):
            self._request(step, now)
            self._collect(step, now)
        follows = self._step == step - 1
        self._step = step
        # What has just come may be what it warns of.
        if self._guarding.look():
            self._row = None
            return
        planned = self._timeline.take(step)
        if planned is not None:
            if follows and self._row is not None:
                neighbours = self.report.inner if planned.chunk == self._source else self.report.seams
                neighbours.add(self._frame.difference(planned.row, self._row))
            self._row, self._source, self._still_since = planned.row, planned.chunk, None
            counts["executed"] += 1
        else:
            self._starve(step)
        source, index = ("chunk", planned.index) if planned else ("none" if self._row is None else "hold", None)
        self._note = {"step": step, "source": source, "chunk": self._source, "index": index}

    def _starve(self, step: int) -> None:
        """No action for this step: stand still, come to rest, or end."""
        self._source = None
        waits = self._told is None or self._settings.mode == "sync"
        self.report.counts["waited" if waits else "held"] += 1
        stops = not waits and self._settings.starvation == "stop"
        if stops:
            self.end("starved")
        if stops or self._told is None:
            self._row = None
            return
        self._row = coast(self._frame, *self._told, self._settings.motion_kept)
        motion = np.where(self._frame.zero_at_rest, self._row, self._frame.difference(self._row, self._told[0]))
        if np.abs(motion).max() > STILL:
            self._still_since = None
        elif self._still_since is None:
            self._still_since = step

    def _send(self, tick: int, step: int, phase: int, is_new: bool) -> None:
        loop_hz = self._settings.loop_hz
        assert self._row is not None
        target = self._row
        following = self._timeline.peek(step + 1)
        if phase and following is not None:
            fraction = phase / self._settings.commands_per_action
            target = self._frame.moved(target, fraction * self._frame.difference(following.row, target))
            target[self._frame.held] = self._row[self._frame.held]
        command, clipped = self._limiter(target, tick / loop_hz)
        self._robot.command(command)
        sent_s = self._clock.now()
        self.report.jitter.add(sent_s - tick / loop_hz)
        if sent_s >= (tick + 1) / loop_hz:
            self.report.counts["deadline_misses"] += 1
        last, before = (command, command) if self._told is None else self._told
        self._told = command, last if is_new else before
        if is_new:
            self._timeline.executed(step, command)
            if self._recorder is not None:
                self._record("step", time_s=sent_s, row=command.tolist(), clipped=clipped, **self._note)

    def _request(self, step: int, now: float) -> None:
        """Start an inference, if it is time for one."""
        settings, counts = self._settings, self.report.counts
        if self._pending is not None or now < self._retry_s:
            return
        committed = self._commits()
        if settings.mode != "sync":
            remaining = 0 if self._timeline.end is None else self._timeline.end - (step + 1)
            trigger = committed if settings.trigger == "deadline" else max(settings.trigger, committed)
            if remaining >= max(trigger, 1):
                return
        seen = self._observer.observe(now)
        if seen is None:
            return
        snapshot, seen_s = seen
        self._guarding.see(snapshot.observation, seen_s)
        first = min(round(seen_s * settings.rate_hz), step)
        began = self._timeline.began
        # The robot stood still until its first command: an older observation shows it as it was then.
        first = first if began is None else max(first, began)
        committed = 0 if began is None else committed
        prefix = self._path(first, step, committed, snapshot) if settings.mode == "async" and committed else None
        guide = self._guide(first, step, committed, snapshot) if settings.mode == "guided" else None
        if committed and (self._delay.steps(settings.rate_hz) or 0) > committed:
            counts["prefix_short"] += 1
        counts["inferences"] += 1
        self._pending = Request(counts["inferences"], snapshot, prefix, first, now, began is None, guide)
        self._pending_is_void = self._pending_is_reported = False
        self._record(
            "inference",
            number=self._pending.number,
            time_s=now,
            observed_s=seen_s,
            first_step=first,
            prefix_length=self._pending.committed,
        )
        if self._recorder is not None:
            self._recorder.saw(self._pending.number, snapshot.observation)
        self._worker.submit(self._pending)

    def _commits(self) -> int:
        """How many of the next chunk's first actions are the last one's: enough for the delay, as far as the policy was
        trained for it; 0 in the modes without."""
        settings, length = self._settings, self._chunk_length
        if settings.mode not in ("async", "guided") or length is None:
            return 0
        most = settings.max_prefix if settings.mode == "async" else length - 1
        steps = self._delay.steps(settings.rate_hz)
        # Of a guided chunk at most half is expected to pass: with more, the next could never be there in time.
        unknown = most if settings.mode == "async" else length // 2
        return min(unknown if steps is None else steps + settings.margin, most, length - 1)

    def _guide(self, first: int, step: int, frozen: int, snapshot: Snapshot) -> Guide:
        """All that is planned, what is executed meanwhile at least; nothing for a robot at rest."""
        length = min(max((self._timeline.end or first) - first, frozen), self._chunk_length or 0)
        if self._timeline.began is None or not length:
            return Guide(np.zeros((0, self._frame.width), np.float32), 0)
        return Guide(self._path(first, step, length, snapshot), frozen)

    def _path(self, first: int, step: int, length: int, snapshot: Snapshot) -> np.ndarray:
        """The actions of the steps from `first` on, executed, planned or held, in the new observation's frame."""
        step_limits = 1 / self._settings.rate_hz, self._settings.commands_per_action
        path = [self._timeline.in_force(first - 1)]
        for prefix_step in range(first, first + length):
            planned = self._timeline.peek(prefix_step)
            if prefix_step <= step:
                path.append(self._timeline.in_force(prefix_step))
            else:
                row = coast(self._frame, path[-1], path[-2], self._settings.motion_kept)
                # What the robot will be told, not what is planned: a plan beyond the limits goes on from within.
                path.append(self._limiter.allowed(row if planned is None else planned.row, path[-1], *step_limits)[0])
        return self._frame.anchored(np.stack(path[1:]), snapshot.origin)

    def _collect(self, step: int, now: float) -> None:
        """Take over a chunk that has come, from `step` on, the first that is still to be executed."""
        outcome = self._worker.poll()
        if outcome is None:
            pending = self._pending
            if pending and not self._pending_is_reported and now - pending.submitted_s > self._settings.hang_s:
                self._pending_is_reported = True
                self._lose(pending, "hung", f"no chunk for {now - pending.submitted_s:.1f} s", now)
            return
        self._pending = None
        if self._pending_is_void:
            self._lose(outcome.request, "void", "the clock went backwards meanwhile", now)
        elif isinstance(outcome.result, Exception):
            self._retry_s = now + self._settings.retry_s
            self._lose(outcome.request, "failed", f"{type(outcome.result).__name__}: {outcome.result}", now)
        else:
            try:
                rows = checked_rows(self._frame, outcome.request, outcome.result)
            except ValueError as reason:
                self._retry_s = now + self._settings.retry_s
                self._lose(outcome.request, "rejected", str(reason), now)
            else:
                self._place(outcome, rows, step, now)

    def _place(self, outcome: Outcome, rows: np.ndarray, step: int, now: float) -> None:
        settings, counts, request = self._settings, self.report.counts, outcome.request
        delay_s = outcome.finished_s - request.first_step / settings.rate_hz
        self.report.delay.add(max(delay_s, 0.0))
        self._delay.add(delay_s)
        self._chunk_length = len(rows)
        first = request.first_step
        # To a robot at rest since its observation no chunk comes too late: it starts with the first action, or with the
        # first after the prefix, which then tells it to stand still.
        if settings.mode == "sync" or request.at_rest:
            first = step
        elif self._still_since is not None and first >= self._still_since:
            first = max(first, step - request.committed)
        if self._told is None:
            start = self._frame.start(request.snapshot.origin)
            if start is not None:
                self._limiter.start(start, (step - 1) / settings.rate_hz)
        used = rows[: settings.execute] if settings.mode == "sync" else rows
        placement = self._timeline.place(used, first, request.committed, step, request.number)
        counts["unused"] += len(rows) - len(used)
        counts["late"] += placement.late
        counts["committed"] += placement.committed
        counts["replaced"] += placement.replaced
        counts["chunks"] += 1
        if placement.takeover is None:
            counts["outdated"] += 1
            self.report.last_error = (
                f"inference {request.number} outdated: its chunk came {delay_s:.2f} s after its observation, when all "
                f"of its {len(rows)} actions were past"
            )
        else:
            self._guarding.plan(outcome)
        self._record(
            "chunk",
            number=request.number,
            finished_s=outcome.finished_s,
            time_s=now,
            first_step=first,
            takeover=placement.takeover,
            prefix_length=request.committed,
            late=placement.late,
            rows=used.tolist(),
        )

    def _lose(self, request: Request, count: str, reason: str, now: float) -> None:
        self.report.counts[count] += 1
        self.report.last_error = f"inference {request.number} {count}: {reason}"
        self._record("lost", number=request.number, time_s=now, reason=count, detail=reason)

    def _clock_went_back(self) -> None:
        """Steps from before mean nothing on the new time: drop what was planned, and hold until there is a chunk."""
        self.report.counts["clock_jumps"] += 1
        self.report.counts["discarded"] += self._timeline.clear()
        self._pending_is_void = True
        self._step, self._still_since, self._retry_s = None, None, -math.inf
        self._limiter.clock_jumped((self._next_tick() - 1) / self._settings.loop_hz)
        if self._told is not None:
            self._told = self._told[0], self._told[0]
        self._record("clock", time_s=self._clock.now())

    def _finish(self) -> None:
        self._worker.close(self._settings.hang_s)
        self._guarding.close()
        report = self.report
        report.ended = report.ended or "time"
        if self._pending is not None:
            # What it gave while the policy was waited for, if anything, nobody has looked at.
            report.counts["open"] += 1
            number, detail = self._pending.number, "the run ended before its outcome"
            self._record("lost", number=number, time_s=self._clock.now(), reason="open", detail=detail)
        report.counts["left"] += len(self._timeline)
        report.counts.update({f"clipped {kind}": count for kind, count in self._limiter.clipped.items()})
        self._record("report", **report.to_json())

    def _record(self, kind: str, **fields: Any) -> None:
        if self._recorder is not None:
            self._recorder.write(kind, **fields)
