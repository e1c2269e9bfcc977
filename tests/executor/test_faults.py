"""What goes wrong, in virtual time: slow or failing policies, bad chunks, stalls, clocks that jump, blind sensors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.executor.support import (
    CALL,
    RATE_HZ,
    STEP,
    WIDTH,
    GuidedPolicy,
    MarkedPolicy,
    MarkedRobot,
    assert_adds_up,
    execute,
    make_chunk,
    with_actions,
)
from xr0_engine.executor import Executor, Limits, PlainFrame, Settings, Snapshot, VirtualClock


def of_chunks(report, robot):
    """Which commands are actions of a chunk, not held."""
    return robot.column(STEP) == robot.steps


def test_inference_five_times_slower_than_promised():
    report, robot, policy = execute(delay_steps=15.0, expected_delay_s=3 / RATE_HZ, seconds=8)
    c = report.counts
    np.testing.assert_array_equal(np.diff(robot.steps), 1)
    assert max(len(prefix) for _, prefix in policy.calls if prefix is not None) == 6
    assert c["prefix_short"] > 0
    assert c["late"] > 0
    on_time = (robot.column(CALL) > 1) & of_chunks(report, robot)
    assert on_time.sum() > 100
    assert c["held"] + c["executed"] + c["waited"] == 240
    assert_adds_up(report)


@pytest.mark.parametrize("mode", ["async", "naive_async"])
@pytest.mark.parametrize("starvation", ["hold", "decelerate"])
def test_inference_slower_than_a_chunk_lasts(mode, starvation):
    """The robot goes on chunk by chunk: what was seen at rest is executed from its first action after the prefix."""
    report, robot, policy = execute(mode, delay_steps=40.0, seconds=20, starvation=starvation)
    assert report.counts["executed"] >= 5 * 24
    assert report.counts["outdated"] > 0
    calls, position = robot.column(CALL), robot.column(STEP)
    for call in np.unique(calls)[1:]:
        observation, prefix = policy.calls[int(call) - 1]
        first = round(observation.timestamp_s * RATE_HZ)
        assert position[calls == call][0] == first + (0 if prefix is None else len(prefix))
    np.testing.assert_array_equal(np.diff(robot.steps), 1)
    assert_adds_up(report)


@pytest.mark.parametrize(
    "error", [ConnectionError("gone"), ValueError("bad"), KeyError("bug")], ids=lambda e: type(e).__name__
)
def test_policy_dies_and_returns(error):
    policy = MarkedPolicy(faults=dict.fromkeys(range(3, 12), error))
    report, robot, _ = execute(policy=policy, seconds=8)
    c = report.counts
    assert c["failed"] == 9
    assert c["held"] > 0
    np.testing.assert_array_equal(np.diff(robot.steps), 1)
    # What is held is the last target, and then the robot goes on with chunks of the right time.
    held = np.flatnonzero(~of_chunks(report, robot) & (robot.column(CALL) > 1))
    np.testing.assert_array_equal(np.array(robot.rows)[held], np.array(robot.rows)[held - 1])
    assert of_chunks(report, robot)[-30:].all()
    assert type(error).__name__ in report.last_error
    assert_adds_up(report)


def test_prefix_after_starving_is_what_was_held():
    policy = MarkedPolicy(faults=dict.fromkeys(range(3, 12), ConnectionError("gone")))
    _, robot, policy = execute(policy=policy, seconds=8)
    told = dict(zip(robot.steps.tolist(), robot.rows, strict=True))
    observation, prefix = policy.calls[11]
    first = round(observation.timestamp_s * RATE_HZ)
    assert (prefix == prefix[0]).all()
    np.testing.assert_array_equal(prefix, [told[first + index] for index in range(len(prefix))])


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        pytest.param(with_actions(lambda a: np.where(a > 0, np.nan, a)), "finite", id="nan"),
        pytest.param(with_actions(lambda a: np.where(np.arange(len(a))[:, None] == 29, np.inf, a)), "finite", id="inf"),
        pytest.param(with_actions(lambda a: a[:, :2]), "shape", id="narrow"),
        pytest.param(with_actions(lambda a: a[:0]), "shape", id="empty"),
        pytest.param(with_actions(lambda a: a + 1), "prefix", id="other prefix"),
        pytest.param(lambda chunk: replace(chunk, prefix_length=0), "prefix_length", id="ignored prefix"),
    ],
)
def test_a_bad_chunk_never_reaches_the_robot(fault, complaint):
    policy = MarkedPolicy(faults={3: fault, 4: fault})
    report, robot, _ = execute(policy=policy)
    assert report.counts["rejected"] == 2
    assert complaint in report.last_error
    assert not np.isin([3, 4], robot.column(CALL)).any()
    assert np.isfinite(robot.rows).all()
    assert_adds_up(report)


@pytest.mark.parametrize(("starvation", "stops"), [("hold", False), ("decelerate", False), ("stop", True)], ids=str)
def test_starvation(starvation, stops):
    policy = MarkedPolicy(faults=dict.fromkeys(range(2, 100), ConnectionError("gone")))
    report, robot, _ = execute(policy=policy, starvation=starvation)
    position = robot.column(STEP)
    assert report.counts["executed"] == 30
    if stops:
        assert (len(position), report.ended) == (30, "starved")
    elif starvation == "hold":
        assert (position[30:] == position[29]).all()
    else:
        speed = np.diff(position)[29:]
        assert (np.diff(speed) < 0).all()
        assert 0 < speed[0] < 1
        assert speed[-1] < 1e-6
    assert robot.stops == 1


@pytest.mark.parametrize(("keep", "expected"), [("hold", 0.0), ("decelerate", None)], ids=["hold", "decelerate"])
def test_a_robot_with_deltas_does_not_go_on_moving(keep, expected):
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock)
    deltas = make_chunk(np.full((10, WIDTH), 0.5))

    class Once:
        calls = 0

        def infer(self, observation, prefix=None):
            self.calls += 1
            if self.calls > 1:
                raise ConnectionError("gone")
            return deltas

    Executor(
        Once(), robot, PlainFrame(WIDTH, [0, 1]), Settings(RATE_HZ, starvation=keep), None, clock, lambda _: 0.0
    ).run(2.0)
    starved = np.array(robot.rows)[10:]
    assert (starved[:, 2] == 0.5).all()
    if expected is not None:
        assert (starved[:, :2] == expected).all()
    else:
        assert (np.diff(starved[:, :2], axis=0) < 0).all()


def test_starving_behind_a_limit_does_not_turn_back():
    """A command that a limit holds back follows through the whole step; what is held is the last one."""
    limits = replace(Limits.none(WIDTH), velocity=np.array([12.0, np.inf, np.inf]))
    policy = MarkedPolicy(faults=dict.fromkeys(range(2, 100), ConnectionError("gone")))
    report, robot, _ = execute(commands_per_action=4, limits=limits, policy=policy)
    assert report.counts["held"] > 50
    assert (np.diff(robot.column(STEP)) >= 0).all()


def test_a_stall_skips_actions_and_counts_them():
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock, on_command=lambda count: clock.jump(5.5 / RATE_HZ) if count == 50 else None)
    report, robot, _ = execute(clock=clock, robot=robot)
    c = report.counts
    assert (c["missed"], c["skipped"]) == (4, 4)
    # The tick that stalled was late for its own deadline, too.
    assert c["deadline_misses"] == 4 + 1
    assert np.diff(robot.steps).tolist().count(5) == 1
    later = robot.column(CALL) > 1
    np.testing.assert_array_equal(robot.column(STEP)[later], robot.steps[later])
    assert_adds_up(report)


@pytest.mark.parametrize("seconds", [-0.5, -3600.0, 3600.0], ids=lambda jump: f"{jump:+g}s")
def test_clock_jumps(seconds):
    clock = VirtualClock(10000.0)
    robot = MarkedRobot(clock, on_command=lambda count: clock.jump(seconds) if count == 50 else None)
    report, robot, _ = execute(clock=clock, robot=robot, seconds=4.0 + max(seconds, 0))
    c = report.counts
    assert_adds_up(report)
    before, after = robot.steps[:50], robot.steps[50:]
    assert len(after) > 50
    if seconds < 0:
        assert (c["clock_jumps"], c["missed"]) == (1, 0)
        assert c["discarded"] > 0
        # Not one tick is waited for.
        assert after[0] == before[-1] + round(seconds * RATE_HZ)
    else:
        assert (c["clock_jumps"], c["missed"]) == (0, round(seconds * RATE_HZ) - 1)
        assert c["skipped"] > 0
    # The robot stays where it was until a chunk of the new time has come.
    rows = np.array(robot.rows)
    held = rows[50 : 50 + c["held"]]
    assert c["held"] > 0
    assert (held == rows[49]).all()
    # That chunk begins with what was held: its prefix is a step longer than the delay.
    assert (rows[50 + c["held"]] == rows[49]).all()
    np.testing.assert_array_equal(rows[51 + c["held"] :, STEP], after[c["held"] + 1 :])


def test_a_clock_that_goes_back_a_little_is_waited_for():
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock, on_command=lambda count: clock.jump(-0.9 / RATE_HZ) if count == 50 else None)
    report, robot, _ = execute(clock=clock, robot=robot)
    assert report.counts["clock_jumps"] == report.counts["held"] == 0
    assert_adds_up(report)


def test_blind_sensors_start_no_inference():
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock, blind=[(101.0, 102.5)])
    report, robot, policy = execute(clock=clock, robot=robot)
    assert report.counts["sensors"] > 0
    assert not any(101.0 <= observation.timestamp_s < 102.5 for observation, _ in policy.calls)
    assert report.counts["held"] > 0
    assert of_chunks(report, robot)[-20:].all()


def test_observation_without_a_time_is_refused():
    class Timeless(MarkedRobot):
        def observe(self, now_s):
            return Snapshot(replace(super().observe(now_s).observation, timestamp_s=None))

    clock = VirtualClock(100.0)
    robot = Timeless(clock)
    with pytest.raises(ValueError, match="timestamp_s"):
        execute(clock=clock, robot=robot)
    assert robot.stops == 1


def test_an_error_of_the_robot_stops_it():
    clock = VirtualClock(100.0)

    def broken(count):
        raise OSError("bus off")

    robot = MarkedRobot(clock, on_command=broken)
    with pytest.raises(OSError, match="bus off"):
        execute(clock=clock, robot=robot)
    assert robot.stops == 1


@given(
    mode=st.sampled_from(["sync", "async", "naive_async", "guided"]),
    length=st.integers(2, 30),
    trigger=st.one_of(st.integers(1, 30), st.just("deadline")),
    delays=st.lists(st.floats(0, 40), min_size=1, max_size=8),
    faults=st.dictionaries(st.integers(1, 12), st.sampled_from(["raise", "nan"])),
    jumps=st.dictionaries(st.integers(1, 100), st.floats(-200, 200), max_size=3),
    age=st.floats(0, 4),
)
@settings(max_examples=60)
def test_no_action_is_repeated_or_skipped_without_being_counted(mode, length, trigger, delays, faults, jumps, age):
    clock = VirtualClock(1000.0)
    kinds = {"raise": RuntimeError("down"), "nan": with_actions(lambda a: a * np.nan)}
    policy_kind = GuidedPolicy if mode == "guided" else MarkedPolicy
    policy = policy_kind(length, faults={call: kinds[kind] for call, kind in faults.items()})
    robot = MarkedRobot(
        clock, on_command=lambda count: clock.jump(jumps.get(count, 0.0) / RATE_HZ), age_s=age / RATE_HZ
    )
    report, robot, _ = execute(
        mode,
        lambda number: delays[number % len(delays)],
        seconds=5.0,
        policy=policy,
        robot=robot,
        clock=clock,
        trigger=trigger,
    )
    assert_adds_up(report, length)
    c = report.counts
    assert c["executed"] + c["held"] + c["waited"] + c["missed"] >= 150
    if not any(jumps.get(count, 0) for count in range(len(robot.rows) + 1)):
        assert c["executed"] + c["held"] + c["waited"] == 150
        np.testing.assert_array_equal(np.diff(robot.steps), 1)
    assert report.seams.count + report.inner.count <= c["executed"]
    assert np.isfinite(np.reshape(robot.rows, (-1, WIDTH))).all()


class StampedRobot(MarkedRobot):
    """Its clock shows `scale * time + offset_s` from the begin_s-th second of the executor's on."""

    def __init__(self, clock, offset_s=0.0, scale=1.0, begin_s=0.0):
        super().__init__(clock)
        self.offset_s, self.scale, self.begin_s = offset_s, scale, begin_s

    def observe(self, now_s):
        snapshot = super().observe(now_s)
        if now_s < self.begin_s:
            return snapshot
        time_s = self.scale * now_s + self.offset_s
        return Snapshot(replace(snapshot.observation, timestamp_s=time_s), snapshot.origin)


@pytest.mark.parametrize(
    ("start_s", "wrong", "complaint"),
    [
        pytest.param(1000.0, {"offset_s": 1.7e9}, "1700000000.000 s ahead of", id="time of day, loop monotonic"),
        pytest.param(1.7e9, {"offset_s": -1.7e9 + 50}, "behind the executor's clock", id="monotonic, loop time of day"),
        pytest.param(1000.0, {"scale": 1e3}, "ahead of", id="milliseconds"),
        pytest.param(1000.0, {"scale": 1 / 60}, "behind", id="minutes"),
        pytest.param(1000.0, {"offset_s": 0.1}, "0.100 s ahead of", id="a little ahead"),
        pytest.param(1000.0, {"offset_s": -3600.0}, "3600.000 s behind", id="another time zone"),
    ],
)
def test_observations_of_another_clock_are_told_at_the_first_one(start_s, wrong, complaint):
    clock = VirtualClock(start_s)
    robot = StampedRobot(clock, **wrong)
    report, robot, policy = execute(clock=clock, robot=robot, seconds=1 / RATE_HZ)
    assert report.counts["mistimed"] == 1
    assert report.last_error.startswith("mistimed: observation.timestamp_s")
    assert complaint in report.last_error
    assert "time.monotonic()" in report.last_error
    report, robot, policy = execute(clock=clock, robot=robot, seconds=2)
    assert (report.counts["mistimed"], report.counts["inferences"]) == (60, 0)
    assert (robot.rows, policy.calls) == ([], [])


def test_a_robot_whose_clock_is_set_meanwhile():
    """It holds, is told why, and goes on when the clocks agree again."""
    clock = VirtualClock(100.0)
    robot = StampedRobot(clock, offset_s=30.0, begin_s=102.0)
    report, robot, _ = execute(clock=clock, robot=robot, seconds=6)
    assert report.counts["mistimed"] > 30
    assert report.counts["held"] > 30
    assert "30.000 s ahead" in report.last_error
    robot.begin_s = float("inf")
    report, robot, _ = execute(clock=clock, robot=robot, seconds=2)
    assert of_chunks(report, robot)[-20:].all()


def test_slow_cameras_are_of_the_right_clock():
    clock = VirtualClock(100.0)
    report, _, _ = execute("sync", clock=clock, robot=StampedRobot(clock, offset_s=-5.0))
    assert (report.counts["mistimed"], report.last_error) == (0, None)


def test_chunks_that_come_too_late_for_any_action_are_told():
    """Older than a chunk lasts, but not too old for a slow camera."""
    clock = VirtualClock(100.0)
    report, _, _ = execute(clock=clock, robot=StampedRobot(clock, offset_s=-3.0), seconds=4)
    assert report.counts["outdated"] > 0
    assert "after its observation, when all of its 30 actions were past" in report.last_error


@pytest.mark.parametrize("time_s", [float("nan"), float("inf")], ids=str)
def test_a_time_that_is_no_number_is_refused(time_s):
    clock = VirtualClock(100.0)
    with pytest.raises(ValueError, match=f"timestamp_s: expected a time on the executor's clock, got {time_s}"):
        execute(clock=clock, robot=StampedRobot(clock, offset_s=time_s))
