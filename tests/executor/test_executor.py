"""The control loop in virtual time: which action at which step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

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
    with_actions,
)
from xr0_engine.executor import BimanualFrame, Executor, Limits, PlainFrame, Settings, Snapshot, VirtualClock
from xr0_engine.robot.decode import ArmPose, BimanualPose, anchor, recover, rotation_exp
from xr0_engine.types import Observation

# float32 prefixes of metres and radians, turned into another frame and back.
FLOAT32 = 1e-6

ARM_FIELDS = ("position_m", "rotation", "joints_rad", "gripper")


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


def test_bimanual_prefix_is_expressed_in_the_new_observation_frame():
    clock = VirtualClock(10.0)

    class Moving(MarkedRobot):
        def observe(self, now_s):
            pose = pose_at(now_s)
            return Snapshot(Observation({}, "go", pose.state(), "bimanual", now_s), pose)

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
