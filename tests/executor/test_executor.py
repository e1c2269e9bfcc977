"""The control loop in virtual time: which action at which step, and what faults do to it."""

from __future__ import annotations

import gc
import threading
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
    MarkedPolicy,
    MarkedRobot,
    assert_adds_up,
    execute,
    make_chunk,
)
from xr0_engine.executor import (
    BimanualFrame,
    Executor,
    Limits,
    PlainFrame,
    Settings,
    Snapshot,
    SystemClock,
    VirtualClock,
)
from xr0_engine.robot.decode import ArmPose, BimanualPose, anchor, bimanual_state, recover, rotation_exp
from xr0_engine.types import Observation

# float32 prefixes of metres and radians, turned into another frame and back.
FLOAT32 = 1e-6


def of_chunks(report, robot):
    """Which commands are actions of a chunk, not held."""
    return robot.column(STEP) == robot.steps


@pytest.mark.parametrize("mode", ["async", "naive_async"])
@pytest.mark.parametrize("delay_steps", [0.0, 1.0, 2.4, 3.0, 5.0], ids=lambda delay: f"delay-{delay:g}")
def test_the_clock_chooses_the_action(mode, delay_steps):
    report, robot, _ = execute(mode, delay_steps)
    # The first chunk starts late, when it comes; all others at the step that matches real time.
    later = robot.column(CALL) > 1
    np.testing.assert_array_equal(robot.column(STEP)[later], robot.steps[later])
    np.testing.assert_array_equal(np.diff(robot.steps), 1)
    assert later.sum() > 80
    assert report.counts["held"] == report.counts["missed"] == report.counts["deadline_misses"] == 0
    assert_adds_up(report)


def test_prefix_is_the_delay_rounded_up_plus_margin():
    _, _, policy = execute(delay_steps=2.4, margin=1)
    lengths = [0 if prefix is None else len(prefix) for _, prefix in policy.calls]
    # Nothing is committed at first; then nobody knows the delay, and the first one is left out as warm-up.
    assert lengths[:2] == [0, 6]
    assert set(lengths[2:]) == {4}


def test_prefix_holds_the_actions_executed_meanwhile():
    report, robot, policy = execute(delay_steps=3.0, margin=1, seconds=6)
    told = dict(zip(robot.steps.tolist(), robot.rows, strict=True))
    checked = 0
    for observation, prefix in policy.calls[1:-1]:
        first = round(observation.timestamp_s * RATE_HZ)
        for index, action in enumerate(prefix):
            np.testing.assert_array_equal(action, told[first + index].astype(np.float32))
            checked += 1
    assert checked > 20
    assert report.counts["late"] == 0


@pytest.mark.parametrize("age_steps", [0.4, 1.0, 2.6], ids=lambda age: f"age-{age:g}")
def test_a_late_camera_belongs_to_an_earlier_step(age_steps):
    clock = VirtualClock(100.0)
    robot = MarkedRobot(clock, age_s=age_steps / RATE_HZ)
    report, robot, policy = execute(delay_steps=2.0, robot=robot, clock=clock, margin=1)
    later = robot.column(CALL) > 1
    np.testing.assert_array_equal(robot.column(STEP)[later], robot.steps[later])
    # The prefix begins at the step of the observation: it covers the camera's delay too.
    assert len(policy.calls[-1][1]) == 2 + round(age_steps) + 1
    assert report.counts["late"] == 0
    assert_adds_up(report)


def test_new_chunk_takes_over_right_after_its_prefix():
    _, robot, policy = execute(delay_steps=1.0, margin=2, trigger=20)
    calls = robot.column(CALL)
    for step in np.flatnonzero(np.diff(calls) > 0)[1:]:
        observation, prefix = policy.calls[int(calls[step + 1]) - 1]
        assert robot.steps[step + 1] == round(observation.timestamp_s * RATE_HZ) + len(prefix)


def test_naive_async_takes_over_on_arrival():
    _, robot, policy = execute("naive_async", delay_steps=3.0)
    calls = robot.column(CALL)
    changes = np.flatnonzero(np.diff(calls) > 0)
    for step in changes:
        observation, prefix = policy.calls[int(calls[step + 1]) - 1]
        assert prefix is None
        assert robot.steps[step + 1] == round(observation.timestamp_s * RATE_HZ) + 3
    assert len(changes) > 3


@pytest.mark.parametrize(("trigger", "remaining"), [(10, 9), (4, 4), ("deadline", 4)], ids=str)
def test_trigger(trigger, remaining):
    """Inference starts when fewer than `trigger` actions remain, and never later than the prefix (5) must begin."""
    _, robot, policy = execute(delay_steps=4.0, margin=1, trigger=trigger, seconds=6)
    calls = robot.column(CALL)
    observation, prefix = policy.calls[-2]
    assert len(prefix) == 5
    given_by = int(calls[robot.steps == round(observation.timestamp_s * RATE_HZ)][0])
    end = round(policy.calls[given_by - 1][0].timestamp_s * RATE_HZ) + 30
    assert end - (round(observation.timestamp_s * RATE_HZ) + 1) == remaining


def test_sync_holds_still_while_it_infers():
    report, robot, policy = execute("sync", delay_steps=5.0, execute=12)
    assert all(prefix is None for _, prefix in policy.calls)
    moving = robot.column(CALL)[robot.steps >= 0]
    # 12 actions, then 5 repeats of the last while the next inference runs.
    per_call = [int((moving == call).sum()) for call in range(1, 5)]
    assert per_call == [17] * 4
    c = report.counts
    assert c["late"] == c["held"] == 0
    assert c["unused"] == 18 * c["chunks"]
    assert c["waited"] + c["executed"] == 120
    assert_adds_up(report)


def test_sync_without_delay_never_waits():
    report, _, _ = execute("sync", delay_steps=0.0, execute=10)
    assert (report.counts["waited"], report.counts["executed"]) == (0, 120)


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


def test_delay_that_needs_a_longer_prefix_than_trained_is_refused():
    with pytest.raises(ValueError, match=r"prefix of 7 actions.*at most 6"):
        Settings(rate_hz=30, expected_delay_s=0.2, margin=1)
    Settings(rate_hz=30, expected_delay_s=0.2, margin=0)
    Settings(rate_hz=30, expected_delay_s=0.2, margin=1, mode="naive_async")


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


def with_actions(change):
    def fault(chunk):
        actions = chunk.actions.copy()
        return replace(chunk, actions=change(actions))

    return fault


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


@given(
    mode=st.sampled_from(["sync", "async", "naive_async"]),
    length=st.integers(2, 30),
    trigger=st.one_of(st.integers(1, 30), st.just("deadline")),
    delays=st.lists(st.floats(0, 40), min_size=1, max_size=8),
    faults=st.dictionaries(st.integers(1, 12), st.sampled_from(["raise", "nan"])),
    jumps=st.dictionaries(st.integers(1, 100), st.floats(-200, 200), max_size=3),
    age=st.floats(0, 4),
)
@settings(max_examples=60, deadline=None)
def test_no_action_is_repeated_or_skipped_without_being_counted(mode, length, trigger, delays, faults, jumps, age):
    clock = VirtualClock(1000.0)
    kinds = {"raise": RuntimeError("down"), "nan": with_actions(lambda a: a * np.nan)}
    policy = MarkedPolicy(length, faults={call: kinds[kind] for call, kind in faults.items()})
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


def test_seams_are_measured():
    # The first chunk starts 3 steps after its observation, and would else be 3 behind the second.
    on_time = {1: with_actions(lambda a: a + np.array([3, 0, 0]))}
    smooth, _, _ = execute("async", delay_steps=3.0, policy=MarkedPolicy(faults=on_time))
    assert smooth.seams.largest[STEP] == smooth.inner.largest[STEP] == smooth.inner.mean[STEP] == 1
    offsets = {call: with_actions(lambda a: a + np.array([0.25, 0, 0])) for call in range(2, 50, 2)}
    rough, _, _ = execute("naive_async", delay_steps=3.0, policy=MarkedPolicy(faults=on_time | offsets))
    assert (rough.seams.largest[STEP], rough.inner.largest[STEP]) == (1.25, 1)


def test_limits_are_applied_and_counted():
    limits = Limits(
        low=np.array([-np.inf, -np.inf, -1]),
        high=np.array([np.inf, np.inf, 1]),
        velocity=np.array([15.0, np.inf, np.inf]),
        jump=np.full(WIDTH, np.inf),
    )
    report, robot, _ = execute(limits=limits)
    assert (np.diff(robot.column(STEP)) <= 0.5 + 1e-9).all()
    assert report.counts["clipped velocity"] > 100
    assert report.counts["clipped position"] == 0


def test_prefix_is_what_the_limits_will_let_through():
    """A plan beyond a limit must not reach the policy as a jump from the clipped past to the unclipped future."""
    limits = replace(Limits.none(WIDTH), high=np.array([3000.0, np.inf, np.inf]))
    _, robot, policy = execute(limits=limits, delay_steps=3.0)
    told = dict(zip(robot.steps.tolist(), robot.rows, strict=True))
    observation, prefix = policy.calls[-2]
    first = round(observation.timestamp_s * RATE_HZ)
    np.testing.assert_array_equal(prefix, [told[first + index].astype(np.float32) for index in range(len(prefix))])
    assert (prefix[:, STEP] == 3000).all()


def test_commands_between_actions_are_interpolated():
    report, robot, _ = execute(commands_per_action=4, delay_steps=3.0)
    later = robot.column(CALL) >= 2
    assert report.counts["executed"] + report.counts["waited"] == 120
    assert np.diff(robot.times).max() == pytest.approx(1 / 120)
    np.testing.assert_allclose(robot.column(STEP)[later], np.array(robot.times)[later] * RATE_HZ, atol=1e-6)
    assert_adds_up(report)


def test_starving_behind_a_limit_does_not_turn_back():
    """A command that a limit holds back follows through the whole step; what is held is the last one."""
    limits = replace(Limits.none(WIDTH), velocity=np.array([12.0, np.inf, np.inf]))
    policy = MarkedPolicy(faults=dict.fromkeys(range(2, 100), ConnectionError("gone")))
    report, robot, _ = execute(commands_per_action=4, limits=limits, policy=policy)
    assert report.counts["held"] > 50
    assert (np.diff(robot.column(STEP)) >= 0).all()


def test_deltas_are_not_interpolated():
    with pytest.raises(ValueError, match="commands_per_action"):
        Executor(MarkedPolicy(), MarkedRobot(None), PlainFrame(3, [0]), Settings(30, commands_per_action=2))


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")], ids=str)
def test_run_needs_a_time(seconds):
    with pytest.raises(ValueError, match="seconds"):
        execute(seconds=seconds)


def pose_at(time_s):
    """A robot that moves and turns all the time."""

    def arm(sign):
        return ArmPose(
            position_m=np.array([0.3, 0.1 * sign, 0.2]) + 0.1 * np.sin(time_s + np.arange(3)),
            rotation=rotation_exp(np.array([0.8 * time_s, sign * 0.3, np.sin(time_s)])),
            joints_rad=0.2 * np.cos(time_s + np.arange(6)),
            gripper=np.array([0.5 + 0.4 * np.sin(time_s)]),
        )

    return BimanualPose(arm(1), arm(-1))


class PathPolicy:
    """Predicts the path pose_at(t) exactly, anchored at the observation's pose; checks the prefix against it."""

    def __init__(self):
        self.errors = []

    def infer(self, observation, prefix=None):
        time_s = observation.timestamp_s
        targets = [pose_at(time_s + index / RATE_HZ) for index in range(30)]
        path = BimanualPose(
            *(
                ArmPose(*(np.stack([getattr(getattr(pose, side), name) for pose in targets]) for name in ARM_FIELDS))
                for side in ("left", "right")
            )
        )
        actions = anchor(path, pose_at(time_s))
        if prefix is not None:
            self.errors.append(np.abs(prefix - actions[: len(prefix)]).max())
        return make_chunk(actions, prefix)


ARM_FIELDS = ("position_m", "rotation", "joints_rad", "gripper")


def test_bimanual_prefix_is_expressed_in_the_new_observation_frame():
    clock = VirtualClock(10.0)

    class Moving(MarkedRobot):
        def observe(self, now_s):
            pose = pose_at(now_s)
            return Snapshot(Observation({}, "go", bimanual_state(pose), "bimanual", now_s), pose)

    robot, policy = Moving(clock), PathPolicy()
    report = Executor(
        policy, robot, BimanualFrame(), Settings(RATE_HZ), clock=clock, delay_s=lambda _: 3 / RATE_HZ
    ).run(6.0)
    # The first chunk starts late (the robot is taken to be at rest), and its actions are the second one's prefix.
    assert len(policy.errors) > 5
    assert max(policy.errors[1:]) < FLOAT32
    # Absolute again, the commands are the path, seams and all.
    told = recover(np.array(robot.rows)[-60:], BimanualPose(*[ArmPose(np.zeros(3), np.eye(3), np.zeros(6), [0])] * 2))
    for index, step in enumerate(robot.steps[-60:]):
        want = pose_at(step / RATE_HZ).left
        np.testing.assert_allclose(told.left.rotation[index], want.rotation, atol=5 * FLOAT32)
        np.testing.assert_allclose(told.left.position_m[index], want.position_m, atol=5 * FLOAT32)
    assert_adds_up(report)


def test_a_policy_that_hangs_does_not_hold_up_the_loop():
    """In real time, with the thread: the second call never returns until the end."""
    clock, release = SystemClock(), threading.Event()

    class Hanging(MarkedPolicy):
        def infer(self, observation, prefix=None):
            if len(self.calls) == 1:
                release.wait(10)
            return super().infer(observation, prefix)

    robot = MarkedRobot(clock)
    executor = Executor(
        Hanging(length=8, rate_hz=100), robot, PlainFrame(WIDTH, ()), Settings(100, hang_s=0.1), None, clock
    )
    report = executor.run(0.6)
    release.set()
    c = report.counts
    assert (c["hung"], c["chunks"]) == (1, 1)
    assert c["executed"] + c["held"] + c["waited"] + c["missed"] >= 59
    assert robot.stops == 1
    assert_adds_up(report, 8)


def test_real_time_with_a_thread():
    clock = SystemClock()
    robot = MarkedRobot(clock)
    executor = Executor(MarkedPolicy(length=20, rate_hz=200), robot, PlainFrame(WIDTH, ()), Settings(200), None, clock)
    report = executor.run(0.5)
    c = report.counts
    assert c["executed"] + c["held"] + c["waited"] + c["missed"] >= 99
    # On a busy machine most actions may come too late; none is lost without being counted.
    assert c["chunks"] > 0
    assert report.jitter.count == len(robot.rows)
    assert_adds_up(report, 20)


def test_end_from_another_thread():
    clock = SystemClock()
    executor = Executor(MarkedPolicy(), MarkedRobot(clock), PlainFrame(WIDTH, ()), Settings(RATE_HZ), None, clock)
    threading.Timer(0.1, executor.end).start()
    assert executor.run(60.0).ended == "asked to"


def test_an_error_of_the_robot_stops_it():
    clock = VirtualClock(100.0)

    def broken(count):
        raise OSError("bus off")

    robot = MarkedRobot(clock, on_command=broken)
    with pytest.raises(OSError, match="bus off"):
        execute(clock=clock, robot=robot)
    assert robot.stops == 1


@pytest.mark.parametrize("frozen_by_caller", [False, True], ids=["by the run alone", "by the caller too"])
def test_no_full_garbage_collection_while_it_runs(frozen_by_caller):
    executing = []
    clock = VirtualClock(100.0)
    if frozen_by_caller:
        gc.freeze()
    try:
        execute(clock=clock, robot=MarkedRobot(clock, on_command=lambda _: executing.append(gc.get_freeze_count())))
        assert min(executing) > 1000
        assert bool(gc.get_freeze_count()) == frozen_by_caller
    finally:
        gc.unfreeze()
