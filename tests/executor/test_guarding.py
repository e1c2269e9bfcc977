"""A guard beside the executor: what it is handed, what becomes of its warnings."""

from __future__ import annotations

import pytest

from tests.executor.support import RATE_HZ, WIDTH, MarkedPolicy, MarkedRobot, assert_adds_up
from xr0_engine.executor import Executor, PlainFrame, Recorder, Settings, VirtualClock, read_recording
from xr0_engine.types import GuardWarning


class Watching:
    """Warns at its third observation; keeps what it is handed."""

    def __init__(self, stops=False):
        self.stops, self.handed, self.found, self.closed = stops, [], [], False
        self.skipped = 0

    def see(self, observation, time_s):
        self.handed.append(("see", observation.timestamp_s))
        assert time_s == observation.timestamp_s
        if sum(kind == "see" for kind, _ in self.handed) == 3:
            self.found.append(GuardWarning("frozen ego", 2.0, 1.0, "the picture stays the same", time_s))

    def plan(self, chunk):
        self.handed.append(("plan", int(chunk.actions[-1, 1])))

    def poll(self):
        found, self.found = self.found, []
        return found

    def close(self, patience_s):
        self.closed = True


def execute(guard, recorder=None, policy=None, seconds=4.0, mode="async", delay_steps=3.0):
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock)
    frame, settings = PlainFrame(WIDTH), Settings(rate_hz=RATE_HZ, mode=mode)
    policy = policy or MarkedPolicy()
    delay_s = lambda number: delay_steps / RATE_HZ  # noqa: E731
    executor = Executor(policy, robot, frame, settings, None, clock, delay_s, recorder, guard)
    return executor.run(seconds), robot


def test_every_observation_and_every_accepted_chunk_is_handed_over():
    broken = RuntimeError("lost")
    guard = Watching()
    report, _ = execute(guard, policy=MarkedPolicy(faults={4: broken}))
    seen, planned = ([value for kind, value in guard.handed if kind == wanted] for wanted in ("see", "plan"))
    assert len(seen) == report.counts["inferences"] > 5
    assert planned == [call + 1 for call in range(len(seen)) if call != 3][: report.counts["chunks"]]
    assert report.counts["failed"] == 1
    assert guard.closed
    assert_adds_up(report)


def test_a_warning_is_counted_told_and_recorded(tmp_path):
    path = tmp_path / "run.jsonl"
    with Recorder(path, "guarded") as recorder:
        report, robot = execute(Watching(), recorder)
    assert report.counts["guard frozen ego"] == 1
    (told,) = report.to_json()["warnings"]
    assert (told["name"], told["value"], told["detail"]) == ("frozen ego", 2.0, "the picture stays the same")
    assert (report.ended, robot.stops) == ("time", 1)
    (line,) = read_recording(path).lines["warning"]
    assert line["time_s"] == told["time_s"]


@pytest.mark.parametrize("mode", ["sync", "async", "naive_async"])
@pytest.mark.parametrize("delay_steps", [0.0, 1.0, 3.0])
def test_a_guard_that_stops_ends_the_run_before_what_it_warned_of_is_executed(mode, delay_steps):
    report, robot = execute(Watching(stops=True), mode=mode, delay_steps=delay_steps)
    assert report.ended == "guard, frozen ego: the picture stays the same"
    assert robot.stops == 1
    # None of the third observation's chunk.
    assert set(robot.column(1)) == {1, 2}


class WarnsOfChunks(Watching):
    """Of its third chunk, as soon as it has come."""

    def see(self, observation, time_s):
        self.handed.append(("see", time_s))

    def plan(self, chunk):
        super().plan(chunk)
        if sum(kind == "plan" for kind, _ in self.handed) == 3:
            self.found.append(GuardWarning("disagreement", 2.0, 1.0, "two chunks differ", 0.0))


@pytest.mark.parametrize("mode", ["sync", "async", "naive_async"])
def test_a_chunk_that_it_warns_of_is_not_begun(mode):
    report, robot = execute(WarnsOfChunks(stops=True), mode=mode, delay_steps=1.0)
    assert report.ended == "guard, disagreement: two chunks differ"
    assert set(robot.column(1)) == {1, 2}
    assert_adds_up(report)


def test_what_it_had_no_time_for_is_told():
    guard = Watching()
    guard.skipped = 7
    report, _ = execute(guard)
    assert report.counts["guard skipped"] == 7


def test_without_a_guard_nothing_is_different():
    guarded, robot = execute(Watching())
    plain, other = execute(None)
    assert [*map(tuple, robot.rows)] == [*map(tuple, other.rows)]
    assert plain.warnings == []
    assert {name: count for name, count in guarded.counts.items() if name != "guard frozen ego"} == plain.counts
