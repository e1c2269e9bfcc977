"""Decode and the bimanual anchoring: inverse pairs, conventions, and rotations near angle 0 and pi."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xr0_engine.robot.decode import (
    LEFT,
    RIGHT,
    ArmPose,
    BimanualPose,
    anchor,
    decode,
    encode_prefix,
    recover,
    rotation_exp,
    rotation_log,
)
from xr0_engine.robot.normalize import ActionStatistics

# A handful of float64 roundings of numbers near 1.
EXACT = 1e-13
# The matrix of a turn near pi fixes its axis to the rounding of its entries, 1e-16, times pi.
NEAR_PI = 1e-12
# float32 rounding of values of size 10, twice.
FLOAT32_ROUND_TRIP = 1e-5

unit = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: math.hypot(*axis) > 1e-3)
angles = st.one_of(
    st.floats(0, math.pi - 1e-9),
    st.floats(0, 1e-6),
    st.floats(1e-9, 1e-3).map(lambda gap: math.pi - gap),
)


def axis_angle(axis, angle):
    return np.array(axis) / np.linalg.norm(axis) * angle


def random_pose(rng, steps=()):
    def arm():
        return ArmPose(
            position_m=rng.normal(size=(*steps, 3)),
            rotation=rotation_exp(rng.normal(size=(*steps, 3))),
            joints_rad=rng.normal(size=(*steps, 6)),
            gripper=rng.uniform(size=(*steps, 1)),
        )

    return BimanualPose(arm(), arm())


def assert_same_pose(actual, expected, atol):
    for side in ("left", "right"):
        for name in ("position_m", "rotation", "joints_rad", "gripper"):
            got, want = (getattr(getattr(pose, side), name) for pose in (actual, expected))
            np.testing.assert_allclose(got, want, atol=atol, rtol=0, err_msg=f"{side} {name}")


@given(unit, angles)
def test_log_inverts_exp(axis, angle):
    vector = axis_angle(axis, angle)
    np.testing.assert_allclose(rotation_log(rotation_exp(vector)), vector, atol=NEAR_PI, rtol=0)


@given(unit, st.one_of(angles, st.just(math.pi), st.floats(math.pi, 20)))
def test_exp_inverts_log_for_any_angle(axis, angle):
    rotation = rotation_exp(axis_angle(axis, angle))
    vector = rotation_log(rotation)
    assert np.linalg.norm(vector) <= math.pi + EXACT
    np.testing.assert_allclose(rotation_exp(vector), rotation, atol=NEAR_PI, rtol=0)


@given(unit, st.floats(0, 4))
def test_exp_is_the_exponential_series(axis, angle):
    x, y, z = axis_angle(axis, angle)
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    term = total = np.eye(3)
    # 4**40 / 40! is far below a rounding.
    for order in range(1, 41):
        term = term @ skew / order
        total = total + term
    np.testing.assert_allclose(rotation_exp(np.array([x, y, z])), total, atol=EXACT, rtol=0)


@pytest.mark.parametrize("axis", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (-1, 2, -3)], ids=str)
def test_half_turn(axis):
    vector = axis_angle(axis, math.pi)
    found = rotation_log(rotation_exp(vector))
    # Both signs of the axis are the same half turn.
    np.testing.assert_allclose(np.abs(found @ vector), math.pi**2, atol=NEAR_PI, rtol=0)


def test_tiny_angles_are_kept_and_identity_is_zero():
    np.testing.assert_array_equal(rotation_log(np.eye(3)), 0)
    np.testing.assert_array_equal(rotation_exp(np.zeros(3)), np.eye(3))
    tiny = np.array([1e-12, -2e-12, 3e-12])
    np.testing.assert_allclose(rotation_log(rotation_exp(tiny)), tiny, rtol=EXACT)


def test_rotations_of_any_leading_shape():
    vectors = np.random.default_rng(0).normal(size=(2, 5, 3))
    rotations = rotation_exp(vectors)
    assert rotations.shape == (2, 5, 3, 3)
    np.testing.assert_allclose(rotation_log(rotations), vectors, atol=EXACT)


def test_anchor_follows_the_definition_in_the_published_columns():
    rng = np.random.default_rng(1)
    origin, targets = random_pose(rng), random_pose(rng, (4,))
    actions = anchor(targets, origin)
    assert actions.shape == (4, 32)
    for start, columns in ((origin.left, 0), (origin.right, 14)):
        arm = targets.left if columns == 0 else targets.right
        for step in range(4):
            row = actions[step, columns : columns + 13]
            np.testing.assert_allclose(
                row[:3], start.rotation.T @ (arm.position_m[step] - start.position_m), atol=EXACT
            )
            np.testing.assert_allclose(rotation_exp(row[3:6]), start.rotation.T @ arm.rotation[step], atol=EXACT)
            np.testing.assert_allclose(row[6:7], arm.gripper[step] - start.gripper, atol=EXACT)
            np.testing.assert_allclose(row[7:13], arm.joints_rad[step] - start.joints_rad, atol=EXACT)
    np.testing.assert_array_equal(actions[:, [13, 27, 28, 29, 30, 31]], 0)


def test_columns_do_not_overlap_and_leave_the_reserved_ones():
    used = [
        column
        for arm in (LEFT, RIGHT)
        for part in (arm.position, arm.rotation, arm.gripper, arm.joints)
        for column in range(32)[part]
    ]
    assert used == [*range(13), *range(14, 27)]


@given(st.integers(0, 2**32 - 1), st.integers(0, 6))
def test_recover_inverts_anchor(seed, steps):
    rng = np.random.default_rng(seed)
    origin, targets = random_pose(rng), random_pose(rng, (steps,))
    assert_same_pose(recover(anchor(targets, origin), origin), targets, atol=NEAR_PI)


def test_prefix_moves_to_the_frame_of_a_new_observation():
    rng = np.random.default_rng(2)
    old, new, targets = random_pose(rng), random_pose(rng), random_pose(rng, (5,))
    moved = anchor(recover(anchor(targets, old), old), new)
    np.testing.assert_allclose(moved, anchor(targets, new), atol=NEAR_PI)


def test_state_columns():
    pose = random_pose(np.random.default_rng(3))
    state = pose.state()
    assert state.shape == (1, 32)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state[0, 6:13], np.r_[pose.left.gripper, pose.left.joints_rad].astype(np.float32))
    np.testing.assert_array_equal(state[0, 20:27], np.r_[pose.right.gripper, pose.right.joints_rad].astype(np.float32))
    np.testing.assert_array_equal(np.delete(state[0], [*range(6, 13), *range(20, 27)]), 0)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6], ids=["hub", "post-training"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_encode_prefix_inverts_decode(epsilon, rows):
    rng = np.random.default_rng(4)
    std = rng.uniform(0.1, 3, (8, 32)).astype(np.float32)
    std[:, 27:] = 0
    statistics = ActionStatistics(rng.normal(size=std.shape).astype(np.float32), std, epsilon)
    normalized = rng.normal(size=(8, 32)).astype(np.float32)
    normalized[:, 27:] = 0
    actions = decode(normalized, statistics)
    assert actions.shape == (8, 32)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(encode_prefix(actions[:rows], statistics), normalized[:rows], atol=FLOAT32_ROUND_TRIP)


def arm_fields(**changed):
    fields = {"position_m": np.zeros(3), "rotation": np.eye(3), "joints_rad": np.zeros(6), "gripper": np.zeros(1)}
    return fields | changed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"rotation": np.eye(3).reshape(9)}, "rotation: expected shape"),
        ({"joints_rad": np.zeros(7)}, "joints_rad: expected shape"),
        ({"gripper": np.zeros((4, 1))}, "gripper: expected shape"),
        ({"position_m": np.array([0, np.nan, 0])}, "position_m: expected finite"),
        ({"rotation": 1.1 * np.eye(3)}, "rotation: expected rotation matrices"),
        ({"rotation": np.diag([1.0, 1.0, -1.0])}, "a reflection"),
    ],
    ids=["flat matrix", "seven joints", "lengths differ", "NaN", "scaled", "reflection"],
)
def test_faulty_pose(changed, match):
    with pytest.raises(ValueError, match=match):
        ArmPose(**arm_fields(**changed))


def test_single_poses_and_trajectories_are_told_apart():
    rng = np.random.default_rng(5)
    pose, trajectory = random_pose(rng), random_pose(rng, (2,))
    with pytest.raises(ValueError, match="origin: expected a single pose, got a trajectory of 2"):
        anchor(trajectory, trajectory)
    with pytest.raises(ValueError, match="targets: expected a trajectory"):
        anchor(pose, pose)
    with pytest.raises(ValueError, match="pose: expected a single pose"):
        trajectory.state()
    with pytest.raises(ValueError, match="as many poses as left"):
        BimanualPose(pose.left, trajectory.right)


@pytest.mark.parametrize(
    ("actions", "match"),
    [(np.zeros((2, 14)), "expected shape"), (np.zeros(32), "expected shape"), (np.full((1, 32), np.inf), "finite")],
    ids=["14 columns", "one row", "infinite"],
)
def test_faulty_actions(actions, match):
    with pytest.raises(ValueError, match=f"actions: .*{match}"):
        recover(actions, random_pose(np.random.default_rng(6)))
