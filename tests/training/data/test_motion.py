"""Targets that follow an observation: anchoring, the episode's end, resampling."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.data.fixtures import ALL_PARTS, random_parts
from xr0_engine.robot.decode import LEFT, RIGHT, recover, rotation_log
from xr0_engine.training.data.episode import arm_parts, part_columns, poses_of
from xr0_engine.training.data.motion import BimanualMotion, PlainMotion, resampled_ticks, take

# Targets are float64 throughout.
EXACT = 1e-9


@pytest.fixture
def motion() -> BimanualMotion:
    rng = np.random.default_rng(0)
    proprios, targets = (poses_of(random_parts(20, rng), 20) for _ in range(2))
    return BimanualMotion(proprios, targets, part_columns(ALL_PARTS))


def test_anchored_actions_recover_the_absolute_targets(motion):
    absolute = recover(motion.actions(4, 10), take(motion.proprios, 4))
    expected = arm_parts(take(motion.targets, np.arange(4, 14)))
    for key, rows in arm_parts(absolute).items():
        np.testing.assert_allclose(rows, expected[key], atol=EXACT, err_msg=str(key))


def test_columns_are_those_of_the_layout(motion):
    """Spec section 3.4, spelled out for one step."""
    proprios, targets = arm_parts(motion.proprios), arm_parts(motion.targets)
    action = motion.actions(3, 6)[5]
    for arm, columns in (("left", LEFT), ("right", RIGHT)):
        start = proprios[arm, "rotation"][3].reshape(3, 3)
        moved = targets[arm, "position"][8] - proprios[arm, "position"][3]
        np.testing.assert_allclose(action[columns.position], start.T @ moved, atol=EXACT)
        turned = start.T @ targets[arm, "rotation"][8].reshape(3, 3)
        np.testing.assert_allclose(action[columns.rotation], rotation_log(turned), atol=EXACT)
        for part, where in (("joints", columns.joints), ("gripper", columns.gripper)):
            np.testing.assert_allclose(action[where], targets[arm, part][8] - proprios[arm, part][3], atol=EXACT)
    assert not action[[13, *range(27, 32)]].any()


def test_state_holds_joints_and_grippers(motion):
    state, measured = motion.state(7), arm_parts(motion.proprios)
    assert (state.shape, state.dtype) == ((1, 32), np.float32)
    np.testing.assert_array_equal(state[0, LEFT.joints], measured["left", "joints"][7].astype(np.float32))
    np.testing.assert_array_equal(state[0, RIGHT.gripper], measured["right", "gripper"][7].astype(np.float32))
    assert np.count_nonzero(state) == 14


def test_last_target_is_held_beyond_the_end(motion):
    actions = motion.actions(17, 6)
    np.testing.assert_array_equal(actions[3:], np.tile(actions[2], (3, 1)))


def test_parts_that_are_not_reported_are_no_columns():
    present = {key: key[1] in ("joints", "gripper") for key in ALL_PARTS}
    parts = {key: rows for key, rows in random_parts(5, np.random.default_rng(1)).items() if present[key]}
    motion = BimanualMotion(poses_of(parts, 5), poses_of(parts, 5), part_columns(present))
    assert np.flatnonzero(motion.columns).tolist() == [*range(6, 13), *range(20, 27)]
    assert not motion.actions(0, 5)[:, ~motion.columns].any()


def test_plain_actions_are_taken_as_they_are_unless_something_is_subtracted():
    rng = np.random.default_rng(2)
    states, targets = rng.normal(size=(2, 8, 32))
    origins = np.where(np.arange(32) < 3, states, 0)
    motion = PlainMotion(states.astype(np.float32), targets, origins, np.arange(32) < 7)
    actions = motion.actions(2, 4)
    np.testing.assert_array_equal(actions[:, :3], targets[2:6, :3] - states[2, :3])
    np.testing.assert_array_equal(actions[:, 3:], targets[2:6, 3:])


@pytest.mark.parametrize(
    ("count", "from_hz", "to_hz", "expected"),
    [
        pytest.param(5, 30, 30, [0, 1, 2, 3, 4], id="same"),
        pytest.param(6, 50, 30, [0, 2, 3, 5], id="50 to 30"),
        pytest.param(4, 15, 30, [0, 1, 1, 2, 2, 3, 3], id="15 to 30, ties to the later"),
        pytest.param(9, 60, 30, [0, 2, 4, 6, 8], id="60 to 30"),
        pytest.param(1, 50, 30, [0], id="one"),
    ],
)
def test_every_tick_takes_the_nearest_measurement(count, from_hz, to_hz, expected):
    assert resampled_ticks(count, from_hz, to_hz).tolist() == expected


@pytest.mark.parametrize(("from_hz", "to_hz"), [(50, 30), (24, 30), (10, 30), (29.97, 30), (30, 5)], ids=str)
def test_no_measurement_is_nearer(from_hz, to_hz):
    ticks = resampled_ticks(200, from_hz, to_hz)
    distance = np.abs(np.arange(200) / from_hz - np.arange(len(ticks))[:, None] / to_hz)
    np.testing.assert_allclose(distance[np.arange(len(ticks)), ticks], distance.min(axis=1), atol=EXACT)
