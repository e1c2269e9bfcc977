"""A policy that tells how it wants to be driven is driven so, or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.executor.support import GRIP, RATE_HZ, STEP, WIDTH, MarkedPolicy, MarkedRobot, execute
from xr0_engine.executor import BimanualFrame, VirtualClock, frame_for
from xr0_engine.types import RobotInfo

MARKED = RobotInfo(
    chunk_length=30,
    control_rate_hz=RATE_HZ,
    replan_every=None,
    views=(),
    layout="plain",
    action_width=WIDTH,
    max_prefix=6,
    step_columns=(),
    two_valued_columns=(GRIP,),
)


class Telling(MarkedPolicy):
    """MarkedPolicy that says how it is driven; fields: what it says otherwise."""

    def __init__(self, **fields):
        super().__init__()
        self.info = replace(MARKED, **fields)

    def robot_info(self, robot_type=None):
        if robot_type != "robot":
            raise ValueError(f"robot_type: expected robot, got {robot_type!r}")
        return self.info


def test_what_it_says_is_how_it_is_driven():
    report, _, _ = execute(policy=Telling(), commands_per_action=2)
    assert report.counts["executed"] > 100
    assert report.last_error is None


@pytest.mark.parametrize(
    ("told", "settings", "complaint"),
    [
        pytest.param(
            {"control_rate_hz": 15.0}, {}, r"for 15 Hz, Settings have 30: Settings\(rate_hz=15\)", id="half the rate"
        ),
        pytest.param({"control_rate_hz": 29.97}, {}, "for 29.97 Hz, Settings have 30", id="nearly the rate"),
        pytest.param({"layout": "bimanual"}, {}, "of layout bimanual, the frame is of plain", id="layout"),
        pytest.param({"action_width": 32}, {}, "have 32 columns, the frame has 3", id="width"),
        pytest.param(
            {"step_columns": (0, 1)}, {}, "columns 0, 1 of the policy's.* are steps, .* frame are none", id="steps"
        ),
        pytest.param(
            {"two_valued_columns": (1,)},
            {"commands_per_action": 2},
            "columns 1 of the policy's.* two values.*, held_columns of the frame are 2",
            id="interpolated",
        ),
        pytest.param(
            {"two_valued_columns": (1,)}, {"starvation": "decelerate"}, "columns 1 .* two values", id="coasting"
        ),
        pytest.param({"chunk_length": 10}, {"mode": "sync", "execute": 12}, "have 10 actions, .* 12", id="execute"),
        pytest.param({"max_prefix": 3}, {}, r"prefixes of up to 3 .* have 6: Settings\(max_prefix=3\)", id="prefix"),
        pytest.param({"chunk_length": 4}, {}, "up to 3 actions, of chunks of 4, Settings have 6", id="short chunks"),
        pytest.param({"max_prefix": 0}, {}, "up to 0 .* mode sync, guided or naive_async", id="no prefixes"),
    ],
)
def test_a_difference_is_refused_before_the_first_command(told, settings, complaint):
    clock, policy = VirtualClock(100.0), Telling(**told)
    robot = MarkedRobot(clock)
    with pytest.raises(ValueError, match=complaint):
        execute(policy=policy, robot=robot, clock=clock, **settings)
    assert (robot.rows, robot.stops, policy.calls) == ([], 1, [])


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ({"two_valued_columns": (1,)}, {}),
        ({"max_prefix": 0}, {"mode": "naive_async"}),
        ({"chunk_length": 10, "max_prefix": 0}, {"mode": "sync", "execute": 10}),
        ({"step_columns": None, "two_valued_columns": None, "max_prefix": None, "action_width": None}, {}),
    ],
    ids=["not interpolated", "without prefixes", "all of a chunk", "not told"],
)
def test_what_makes_no_difference_is_not_refused(told, settings):
    assert execute(policy=Telling(**told), **settings)[0].counts["chunks"] > 0


def test_every_difference_is_told_at_once():
    with pytest.raises(ValueError, match=r"rate_hz: .*max_prefix: .*frame: "):
        execute(policy=Telling(control_rate_hz=15.0, max_prefix=2, layout="bimanual"))


def test_a_robot_that_the_policy_does_not_know():
    policy = Telling()
    policy.robot_info = lambda robot_type: (_ for _ in ()).throw(ValueError("robot_type: expected crane"))
    with pytest.raises(ValueError, match="expected crane"):
        execute(policy=policy)


class TestFrameFor:
    def test_plain(self):
        frame = frame_for(replace(MARKED, step_columns=(0, 1)))
        assert (frame.layout, frame.width) == ("plain", WIDTH)
        assert np.flatnonzero(frame.delta).tolist() == [0, 1]
        assert np.flatnonzero(frame.held).tolist() == [GRIP]

    def test_bimanual(self):
        frame = frame_for(replace(MARKED, layout="bimanual", action_width=32, two_valued_columns=(6, 20)))
        assert isinstance(frame, BimanualFrame)
        assert np.flatnonzero(frame.held).tolist() == [6, 20]

    def test_needs_a_width(self):
        with pytest.raises(ValueError, match="action_width"):
            frame_for(replace(MARKED, action_width=None))


class Gripping(MarkedPolicy):
    """MarkedPolicy that opens and closes every seven steps."""

    def infer(self, observation, prefix=None):
        chunk = super().infer(observation, prefix)
        given = chunk.prefix_length
        steps = round(observation.timestamp_s * RATE_HZ) + np.arange(given, len(chunk.actions))
        chunk.actions[given:, GRIP] = np.where(steps // 7 % 2, 1.0, -1.0)
        return chunk


def test_a_gripper_is_held_until_the_next_action():
    _, robot, _ = execute(policy=Gripping(), commands_per_action=4, seconds=3.0)
    grip = robot.column(GRIP)
    assert set(grip) == {-1.0, 1.0}
    # It changes with an action, never between two; the other columns are interpolated as ever.
    ticks = np.floor(np.array(robot.times) * 4 * RATE_HZ + 1e-6).astype(int)
    assert (ticks[1:][np.diff(grip) != 0] % 4 == 0).all()
    assert len(np.unique(robot.column(STEP) % 1)) == 4


def test_a_gripper_does_not_coast():
    # It moves with the last of the first chunk's 30 actions, and then there are none.
    clock = VirtualClock((7 * 430 - 29) / RATE_HZ)
    policy = Gripping(faults=dict.fromkeys(range(2, 100), ConnectionError("gone")))
    report, robot, _ = execute(delay_steps=0.0, clock=clock, policy=policy, starvation="decelerate")
    assert report.counts["held"] > 50
    assert np.diff(robot.column(STEP))[29] > 0
    assert set(robot.column(GRIP)) == {-1.0, 1.0}
