"""The 60-column layouts as the executor has them: rows in a fixed frame, prefixes, coming to rest; and bad poses."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.executor.timeline import coast
from xr0_engine.robot import mobile
from xr0_engine.robot.decode import quaternion_log, rotation_exp
from xr0_engine.robot.layouts import MOBILE, ROBODOJO

# float32 actions of size 10, once rounded.
FLOAT32 = 2e-6
# Some compositions of float64 rotations.
FLOAT64 = 1e-11


def arm(rng, steps=()):
    return mobile.MobileArm(
        position_m=rng.normal(size=(*steps, 3)),
        rotation=rotation_exp(rng.normal(size=(*steps, 3))),
        gripper=rng.uniform(size=(*steps, 1)),
        joints_rad=rng.normal(size=(*steps, 7)),
    )


def pose(rng, steps=()):
    return mobile.MobilePose(
        arm(rng, steps), arm(rng, steps), rng.normal(size=(*steps, 1)), rng.normal(size=(*steps, 3))
    )


LAYOUTS = pytest.mark.parametrize(
    ("layout", "columns"), [(MOBILE, mobile.MOBILE), (ROBODOJO, mobile.ROBODOJO)], ids=["mobile", "robodojo"]
)


@LAYOUTS
def test_rows_are_the_targets_themselves_and_prefixes_come_back(layout, columns):
    """Chunk of the old observation -> rows -> prefix for the new one: the same targets."""
    rng = np.random.default_rng(0)
    old, new, targets = pose(rng), pose(rng), pose(rng, (4,))
    actions = mobile.anchor(targets, old, columns)
    frame = layout.frame(60)
    rows = frame.absolute(actions, old)
    for place, side in ((columns.left, targets.left), (columns.right, targets.right)):
        np.testing.assert_allclose(rows[:, place.position], side.position_m, atol=FLOAT64)
        np.testing.assert_allclose(rotation_exp(rows[:, place.rotation]), side.rotation, atol=FLOAT64)
        np.testing.assert_allclose(rows[:, place.gripper], side.gripper[:, 0], atol=FLOAT64)
    if columns.waist is not None:
        np.testing.assert_allclose(rows[:, 16], targets.waist[:, 0], atol=FLOAT64)
        np.testing.assert_array_equal(rows[:, 17:20], targets.base_velocity)
    np.testing.assert_allclose(frame.anchored(rows, new), mobile.anchor(targets, new, columns), atol=FLOAT32)
    np.testing.assert_allclose(frame.anchored(rows, old), actions, atol=FLOAT32)


@LAYOUTS
def test_the_robot_starts_where_it_stands(layout, columns):
    origin = pose(np.random.default_rng(1))
    frame = layout.frame(60)
    row = frame.start(origin)
    still = frame.anchored(row[None], origin)[0]
    # Nothing to do but for a gripper whose column is absolute: it stays as wide as it is.
    held = [7, 15] if columns.gripper_is_absolute else []
    np.testing.assert_allclose(np.delete(still, held), 0, atol=FLOAT32)
    assert row[columns.left.gripper] == pytest.approx(origin.left.gripper[0])
    assert row[columns.right.gripper] == pytest.approx(origin.right.gripper[0])


@LAYOUTS
def test_differences_are_undone(layout, columns):
    rng = np.random.default_rng(2)
    frame = layout.frame(60)
    first, second = frame.absolute(mobile.anchor(pose(rng, (2,)), pose(rng), columns), pose(rng))
    np.testing.assert_allclose(frame.moved(first, frame.difference(second, first)), second, atol=FLOAT64)


def test_without_actions_the_base_comes_to_rest():
    """Its velocity is no target to stay at; waist and arms stay where they were told to be."""
    frame = MOBILE.frame(60)
    row = np.zeros(60)
    row[[0, 16, 17, 19]] = [0.5, 0.25, 1.0, -2.0]
    after = coast(frame, row, row, 0.0)
    np.testing.assert_array_equal(after[[0, 16, 17, 19]], [0.5, 0.25, 0, 0])
    np.testing.assert_array_equal(coast(frame, row, row, 0.5)[17:20], [0.5, 0, -1.0])
    # Yet it is no step: commands in between are interpolated, not added up.
    assert not frame.delta.any()
    assert np.flatnonzero(frame.velocity).tolist() == [17, 18, 19]
    assert not ROBODOJO.frame(60).velocity.any()


def test_columns_have_names():
    assert [MOBILE.label(column) for column in (0, 6, 11, 14, 16, 19, 20)] == [
        "left x", "left gripper", "right rx", "right gripper", "waist", "base velocity 3", "column 20",
    ]  # fmt: skip
    assert [ROBODOJO.label(column) for column in (6, 7, 15, 16)] == [
        "column 6", "left gripper", "right gripper", "column 16",
    ]  # fmt: skip


def test_a_state_is_joints_and_grippers():
    rng = np.random.default_rng(3)
    long = arm(rng)
    short = mobile.MobileArm(np.zeros(3), np.eye(3), np.array([0.5]), np.arange(6) + 1.0)
    state = mobile.MobilePose(short, long, np.ones(1), np.ones(3)).state()
    assert state.shape == (1, 60)
    assert state.dtype == np.float32
    np.testing.assert_array_equal(state[0, :8], [1, 2, 3, 4, 5, 6, 0, 0.5])
    np.testing.assert_array_equal(state[0, 8:16], np.float32([*long.joints_rad, long.gripper[0]]))
    # The waist and the base are not in it.
    assert not state[0, 16:].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"position_m": np.zeros(2)}, r"position_m: expected shape \(3,\)"),
        ({"rotation": 2 * np.eye(3)}, "rotation: expected rotation matrices"),
        ({"rotation": np.diag([1.0, 1.0, -1.0])}, "or a reflection"),
        ({"gripper": np.array([np.nan])}, "gripper: expected finite values"),
        ({"joints_rad": np.zeros(8)}, "joints_rad: expected up to 7"),
        ({"joints_rad": np.zeros((2, 7))}, "joints_rad: expected shape"),
    ],
)
def test_bad_arms_are_refused(change, match):
    fields = {"position_m": np.zeros(3), "rotation": np.eye(3), "gripper": np.zeros(1), "joints_rad": np.zeros(7)}
    with pytest.raises(ValueError, match=match):
        mobile.MobileArm(**fields | change)


def test_bad_poses_are_refused():
    rng = np.random.default_rng(4)
    single, path = pose(rng), pose(rng, (3,))
    with pytest.raises(ValueError, match="right: expected as many poses as left"):
        mobile.MobilePose(single.left, path.right)
    with pytest.raises(ValueError, match="waist: expected shape"):
        mobile.MobilePose(single.left, single.right, np.zeros(2))
    with pytest.raises(ValueError, match="origin: expected a single pose, got a trajectory of 3"):
        mobile.anchor(path, path, mobile.MOBILE)
    with pytest.raises(ValueError, match="targets: expected a trajectory"):
        mobile.anchor(single, single, mobile.MOBILE)
    for actions, match in ((np.zeros((2, 32)), r"expected shape \(T, 60\)"), (np.full((1, 60), np.inf), "finite")):
        with pytest.raises(ValueError, match=f"actions: {match}" if match != "finite" else "actions: expected finite"):
            mobile.recover(actions, single, mobile.MOBILE)
    with pytest.raises(ValueError, match=r"origin: expected the robot's pose at the observation \(layout mobile\)"):
        MOBILE.frame(60).absolute(np.zeros((1, 60)), None)


def test_quaternions_of_many_shapes():
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(2, 5, 3))
    vectors *= rng.uniform(0, np.pi, (2, 5, 1)) / np.linalg.norm(vectors, axis=-1, keepdims=True)
    angle = np.linalg.norm(vectors, axis=-1, keepdims=True)
    q = np.concatenate([vectors / angle * np.sin(angle / 2), np.cos(angle / 2)], axis=-1)
    # Of any length and sign; float32 as a simulator has it is taken in float64.
    np.testing.assert_allclose(quaternion_log(-3 * q), vectors, atol=FLOAT64)
    assert quaternion_log(q.astype(np.float32)).dtype == np.float64
    assert quaternion_log(np.full(4, 1e-13)).tolist() == [0, 0, 0]
    np.testing.assert_allclose(quaternion_log(np.array([1e-9, 0, 0, 1.0])), [2e-9, 0, 0], rtol=1e-6, atol=0)
