"""In real time, with the policy in its thread. Runs end by what has happened; times are only there to give up."""

from __future__ import annotations

import threading

import pytest

from tests.executor.support import RATE_HZ, WIDTH, MarkedPolicy, MarkedRobot, assert_adds_up
from xr0_engine.executor import Executor, PlainFrame, Recorder, Settings, SystemClock, read_recording

PATIENCE_S = 60.0


def run_until(condition, policy, settings):
    """Execute until condition(counts) holds; it is asked at every command."""
    clock = SystemClock()
    robot = MarkedRobot(clock, on_command=lambda _: executor.end("done") if condition(executor.report.counts) else None)
    executor = Executor(policy, robot, PlainFrame(WIDTH, ()), settings, None, clock)
    return executor.run(PATIENCE_S), robot


def test_a_policy_that_hangs_does_not_hold_up_the_loop():
    """The second call never returns until the end."""
    release = threading.Event()

    class Hanging(MarkedPolicy):
        def infer(self, observation, prefix=None):
            if len(self.calls) == 1:
                release.wait(PATIENCE_S)
            return super().infer(observation, prefix)

    try:
        report, robot = run_until(
            lambda counts: counts["hung"] and counts["held"] >= 10,
            Hanging(length=8, rate_hz=100),
            Settings(100, hang_s=0.1),
        )
    finally:
        release.set()
    c = report.counts
    assert (report.ended, c["hung"], c["chunks"]) == ("done", 1, 1)
    assert c["executed"] + c["held"] == len(robot.rows)
    assert robot.stops == 1
    assert_adds_up(report, 8)


@pytest.mark.parametrize("patience_s", [0.05, PATIENCE_S], ids=["still at work", "done meanwhile"])
def test_an_inference_that_is_open_at_the_end_is_counted(patience_s, tmp_path):
    """Whether it ends while the policy is waited for or not: what it gave was not executed."""
    release = threading.Event()

    class Slow(MarkedPolicy):
        def infer(self, observation, prefix=None):
            release.wait(PATIENCE_S)
            return super().infer(observation, prefix)

    class Releasing(MarkedRobot):
        def stop(self):
            super().stop()
            if patience_s == PATIENCE_S:
                release.set()

    clock = SystemClock()
    path = tmp_path / "run.jsonl"
    try:
        with Recorder(path, "") as recorder:
            robot, settings = Releasing(clock), Settings(RATE_HZ, hang_s=patience_s)
            report = Executor(
                Slow(length=8), robot, PlainFrame(WIDTH, ()), settings, None, clock, recorder=recorder
            ).run(0.2)
    finally:
        release.set()
    assert {kind: report.counts[kind] for kind in ("inferences", "open", "chunks")} == {
        "inferences": 1,
        "open": 1,
        "chunks": 0,
    }
    assert [line["reason"] for line in read_recording(path).lines["lost"]][-1] == "open"
    assert_adds_up(report, 8)


def test_real_time_with_a_thread():
    report, robot = run_until(lambda counts: counts["chunks"] >= 3, MarkedPolicy(length=20, rate_hz=200), Settings(200))
    c = report.counts
    assert report.ended == "done"
    # On a busy machine most actions may come too late; none is lost without being counted.
    assert report.jitter.count == c["executed"] + c["held"] == len(robot.rows)
    assert_adds_up(report, 20)


def test_end_from_another_thread():
    clock = SystemClock()
    executor = Executor(MarkedPolicy(), MarkedRobot(clock), PlainFrame(WIDTH, ()), Settings(RATE_HZ), None, clock)
    threading.Timer(0.1, executor.end).start()
    assert executor.run(PATIENCE_S).ended == "asked to"
