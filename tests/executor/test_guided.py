"""Mode guided: what the policy is drawn toward, and when its chunk takes over."""

from __future__ import annotations

import numpy as np
import pytest

from tests.executor.support import CALL, STEP, WIDTH, GuidedPolicy, MarkedPolicy, assert_adds_up, execute, make_chunk
from xr0_engine.executor import BimanualFrame, Executor, Settings, Snapshot, VirtualClock
from xr0_engine.robot.decode import ArmPose, BimanualPose, recover, rotation_exp
from xr0_engine.types import Observation

ROUND_TRIP = 1e-5
"""Poses of order 1 through float32 actions."""


def test_a_chunk_is_drawn_toward_what_is_executed_and_planned():
    report, _, policy = execute("guided", delay_steps=3.0, policy=GuidedPolicy(), margin=1)
    first, second, third = policy.guides[:3]
    # At rest there is nothing to go on from; then half a chunk, until the delay is known; then delay and margin.
    assert (first.actions.shape, first.frozen) == ((0, WIDTH), 0)
    assert second.frozen == 15
    assert third.frozen == 3 + 1
    # The first chunk began later than it was for: the robot stood still.
    np.testing.assert_array_equal(second.actions[:, STEP], 3000 + 15 + np.arange(15))
    for guide, (observation, prefix) in zip(policy.guides[2:], policy.calls[2:], strict=True):
        begin = round(observation.timestamp_s * 30)
        assert prefix is None
        # The step that is being executed, and all that remain of the chunk before.
        np.testing.assert_array_equal(guide.actions[:, STEP], begin + np.arange(len(guide.actions)))
        assert len(np.unique(guide.actions[:, CALL])) == 1
        assert guide.actions.dtype == np.float32
    assert len(third.actions) == 10
    assert report.counts["held"] == report.counts["late"] == 0
    assert_adds_up(report)


def test_the_chunk_before_gives_what_is_frozen():
    _, robot, policy = execute("guided", delay_steps=2.0, policy=GuidedPolicy(), margin=2)
    calls = robot.column(CALL)
    for number, (observation, _) in enumerate(policy.calls[2:-1], start=3):
        begin = round(observation.timestamp_s * 30)
        assert policy.guides[number - 1].frozen == 4
        told = dict(zip(robot.steps.tolist(), calls.tolist(), strict=True))
        assert {told[step] for step in range(begin, begin + 4)} == {number - 1}
        assert told[begin + 4] == number
    np.testing.assert_array_equal(robot.column(STEP)[calls > 1], robot.steps[calls > 1])


def test_a_delay_beyond_the_frozen_drops_actions_and_is_counted():
    late = lambda number: 3.0 if number < 5 else 9.0  # noqa: E731
    report, _, _ = execute("guided", delay_steps=late, policy=GuidedPolicy(), margin=0)
    assert report.counts["late"] > 0
    assert_adds_up(report)


def test_where_the_plan_ends_the_robot_stands_still_in_the_guide():
    _, _, policy = execute("guided", delay_steps=9.0, policy=GuidedPolicy(length=8), margin=0, trigger="deadline")
    guide = policy.guides[2]
    assert guide.frozen == len(guide.actions) == 7
    assert (guide.actions[-1] == guide.actions[-2]).all()


def test_a_policy_without_guides_never_moves_the_robot():
    report, robot, _ = execute("guided", policy=MarkedPolicy(), seconds=1.0)
    assert robot.rows == []
    assert report.counts["failed"] > 1
    assert "unexpected keyword argument 'guide'" in report.last_error


def test_a_guide_is_anchored_anew():
    """The robot stands elsewhere at each look; targets stay where they were in the world."""

    def pose(turn):
        arm = ArmPose(np.array([turn, 0.2, 0.3]), rotation_exp(np.array([0, 0, turn])), np.full(6, turn), np.zeros(1))
        return BimanualPose(arm, arm)

    class Robot:
        def __init__(self):
            self.poses = []

        def observe(self, now_s):
            self.poses.append(pose(0.1 * (1 + len(self.poses))))
            return Snapshot(Observation({}, "go", np.zeros(32, np.float32), "robot", now_s), self.poses[-1])

        def command(self, row): ...

        def stop(self): ...

    class Policy:
        def __init__(self):
            self.guides, self.chunks = [], []

        def infer(self, observation, prefix=None, *, guide):
            self.guides.append(guide)
            self.chunks.append(np.random.default_rng(len(self.chunks)).uniform(-0.1, 0.1, (30, 32)))
            return make_chunk(self.chunks[-1])

    robot, policy = Robot(), Policy()
    settings = Settings(30.0, mode="guided", margin=0)
    Executor(policy, robot, BimanualFrame(), settings, None, VirtualClock(), lambda number: 0.1).run(3.0)
    assert len(policy.guides) > 3
    for before, (guide, origin) in enumerate(zip(policy.guides[1:], robot.poses[1:], strict=True)):
        end = len(guide.actions)
        expected = recover(policy.chunks[before][-end:].astype(np.float32), robot.poses[before])
        got = recover(guide.actions, origin)
        np.testing.assert_allclose(got.left.position_m, expected.left.position_m, atol=ROUND_TRIP)
        np.testing.assert_allclose(got.right.rotation, expected.right.rotation, atol=ROUND_TRIP)
        np.testing.assert_allclose(got.left.joints_rad, expected.left.joints_rad, atol=ROUND_TRIP)


@pytest.mark.parametrize("max_prefix", [0, 6])
def test_no_trained_prefix_is_needed(max_prefix):
    assert Settings(30.0, mode="guided", max_prefix=max_prefix, expected_delay_s=1.0).mode == "guided"
