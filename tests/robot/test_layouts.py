"""Layouts: rows to the fixed frame and back, differences and their inverse, names of columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xr0_engine.robot.decode import BIMANUAL_COLUMNS, LEFT, RIGHT, ArmPose, BimanualPose, anchor, recover, rotation_exp
from xr0_engine.robot.layouts import BIMANUAL, LAYOUTS, PLAIN, BimanualFrame, PlainFrame, find_layout

# float32 actions of size 10, once rounded.
FLOAT32 = 2e-6
# The matrix of a turn near pi fixes its axis to the rounding of its entries, 1e-16, times pi, some compositions later.
FLOAT64 = 1e-11

RESERVED = [13, *range(27, 32)]
ROTATIONS = [3, 4, 5, 17, 18, 19]

vectors = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda axis: math.hypot(*axis) > 1e-3)
angles = st.one_of(st.floats(0, math.pi), st.floats(0, 1e-6), st.floats(1e-9, 1e-3).map(lambda gap: math.pi - gap))


def rotation(axis, angle):
    return rotation_exp(np.array(axis) / np.linalg.norm(axis) * angle)


def pose(rng, turn=None):
    def arm():
        return ArmPose(
            position_m=rng.normal(size=3),
            rotation=rotation_exp(rng.normal(size=3)) if turn is None else turn,
            joints_rad=rng.normal(size=6),
            gripper=rng.uniform(size=1),
        )

    return BimanualPose(arm(), arm())


def random_actions(rng, steps):
    actions = rng.normal(size=(steps, BIMANUAL_COLUMNS))
    actions[:, RESERVED] = 0
    return actions


def test_absolute_rows_are_the_targets_themselves():
    rng = np.random.default_rng(0)
    origin, actions = pose(rng), random_actions(rng, 5)
    rows, targets = BimanualFrame().absolute(actions, origin), recover(actions, origin)
    for columns, arm in ((LEFT, targets.left), (RIGHT, targets.right)):
        np.testing.assert_allclose(rows[:, columns.position], arm.position_m, atol=FLOAT64)
        np.testing.assert_allclose(rows[:, columns.joints], arm.joints_rad, atol=FLOAT64)
        np.testing.assert_allclose(rows[:, columns.gripper], arm.gripper, atol=FLOAT64)
        np.testing.assert_allclose(rotation_exp(rows[:, columns.rotation]), arm.rotation, atol=FLOAT64)


@given(vectors, angles, vectors, angles, vectors, angles)
def test_rotations_survive_the_change_of_frame(axis, angle, old_axis, old_angle, new_axis, new_angle):
    """Chunk of the old observation -> absolute -> prefix for the new one: the same targets, at any angle."""
    rng = np.random.default_rng(0)
    frame = BimanualFrame()
    old, new = pose(rng, rotation(old_axis, old_angle)), pose(rng, rotation(new_axis, new_angle))
    actions = random_actions(rng, 2)
    actions[:, LEFT.rotation] = actions[:, RIGHT.rotation] = np.array(axis) / np.linalg.norm(axis) * angle
    rows = frame.absolute(actions, old)
    prefix = anchor(recover(rows, BimanualPose(*[ArmPose(np.zeros(3), np.eye(3), np.zeros(6), [0.0])] * 2)), new)
    np.testing.assert_allclose(frame.anchored(rows, new), prefix, atol=FLOAT32)
    told, again = recover(actions, old), recover(prefix, new)
    for side in ("left", "right"):
        for name in ("position_m", "rotation", "joints_rad", "gripper"):
            want, got = (getattr(getattr(targets, side), name) for targets in (told, again))
            np.testing.assert_allclose(got, want, atol=FLOAT64, err_msg=f"{side} {name}")


def test_round_trip_in_the_same_frame_is_the_identity():
    rng = np.random.default_rng(1)
    frame, origin = BimanualFrame(), pose(rng)
    actions = random_actions(rng, 6).astype(np.float32)
    np.testing.assert_allclose(frame.anchored(frame.absolute(actions, origin), origin), actions, atol=FLOAT32)


@given(vectors, angles, vectors, angles)
def test_moved_inverts_difference(axis, angle, other_axis, other_angle):
    rng = np.random.default_rng(2)
    frame = BimanualFrame()
    row, reference = random_actions(rng, 2)
    row[LEFT.rotation] = np.array(axis) / np.linalg.norm(axis) * angle
    reference[LEFT.rotation] = np.array(other_axis) / np.linalg.norm(other_axis) * other_angle
    again = frame.moved(reference, frame.difference(row, reference))
    np.testing.assert_allclose(frame.difference(again, row), 0, atol=1e-7)


def test_difference_of_rotations_is_the_turn_between_them():
    """Two axis-angle vectors on either side of pi are far apart as numbers and a small turn apart."""
    frame = BimanualFrame()
    row, reference = np.zeros((2, BIMANUAL_COLUMNS))
    row[LEFT.rotation], reference[LEFT.rotation] = [0, 0, math.pi - 0.01], [0, 0, -math.pi + 0.01]
    np.testing.assert_allclose(frame.difference(row, reference)[LEFT.rotation], [0, 0, -0.02], atol=FLOAT64)


def test_start_is_the_pose():
    rng = np.random.default_rng(3)
    origin = pose(rng)
    row = BimanualFrame().start(origin)
    np.testing.assert_allclose(row[LEFT.joints], origin.left.joints_rad)
    np.testing.assert_allclose(row[RIGHT.position], origin.right.position_m)
    assert PlainFrame(7, range(6)).start(None) is None


def test_plain_actions_stay_as_they_are():
    frame = PlainFrame(7, range(6))
    actions = np.random.default_rng(0).normal(size=(4, 7)).astype(np.float32)
    rows = frame.absolute(actions, None)
    assert rows.dtype == np.float64
    np.testing.assert_array_equal(rows, actions)
    np.testing.assert_array_equal(frame.anchored(rows, None), actions)


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        (np.zeros((0, 32)), "shape"),
        (np.zeros((3, 31)), "shape"),
        (np.zeros(32), "shape"),
        (np.full((3, 32), np.nan), "finite"),
        (np.full((3, 32), -np.inf), "finite"),
    ],
    ids=["empty", "narrow", "one row", "nan", "infinite"],
)
@pytest.mark.parametrize("frame", [BimanualFrame(), PlainFrame(32, ())], ids=["bimanual", "plain"])
def test_bad_chunks_are_refused(frame, actions, complaint):
    with pytest.raises(ValueError, match=complaint):
        frame.absolute(actions, pose(np.random.default_rng(0)))


def test_bimanual_needs_a_pose():
    with pytest.raises(ValueError, match="origin"):
        BimanualFrame().absolute(np.zeros((3, 32)), None)


@pytest.mark.parametrize("columns", [[7], [-1]], ids=str)
@pytest.mark.parametrize("name", ["delta_columns", "held_columns"])
def test_columns_of_a_kind_must_exist(name, columns):
    with pytest.raises(ValueError, match=name):
        PlainFrame(7, **{name: columns})


def test_a_step_is_not_held():
    with pytest.raises(ValueError, match=r"held_columns: expected none of delta_columns.*\[5\]"):
        PlainFrame(7, range(6), [5, 6])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_frame_of_a_profile_that_names_columns(layout):
    frame = layout.frame_of(BIMANUAL_COLUMNS, two_valued_columns=(6, 20))
    assert np.flatnonzero(frame.held).tolist() == [6, 20]
    assert not frame.delta.any()
    assert type(frame) is type(layout.frame(BIMANUAL_COLUMNS))


def test_bimanual_panels_hold_every_active_column_once():
    active = np.isin(np.arange(BIMANUAL_COLUMNS), RESERVED, invert=True)
    panels = BIMANUAL.panels(active)
    assert [panel[0].group for panel in panels] == [
        f"{side} {kind}" for side in ("left", "right") for kind in ("position", "rotation", "joints", "gripper")
    ]
    assert sorted(column.index for panel in panels for column in panel) == np.flatnonzero(active).tolist()
    assert {column.unit for column in panels[0]} == {"m"}
    assert {column.index: column.name for column in panels[6]}[22] == "shoulder"


def test_panels_leave_out_what_the_robot_does_not_use():
    panels = BIMANUAL.panels(np.isin(np.arange(BIMANUAL_COLUMNS), [6, 8, 9, 13]))
    assert [[(column.index, column.group, column.name) for column in panel] for panel in panels] == [
        [(8, "left joints", "shoulder"), (9, "left joints", "elbow")],
        [(6, "left gripper", "")],
    ]


def test_plain_panels_are_single_columns():
    panels = PLAIN.panels(np.isin(np.arange(32), [0, 6]))
    assert [[(column.index, column.group) for column in panel] for panel in panels] == [
        [(0, "column 0")],
        [(6, "column 6")],
    ]


@pytest.mark.parametrize(
    ("layout", "column", "label"),
    [
        ("bimanual", 0, "left x"),
        ("bimanual", 3, "left rx"),
        ("bimanual", 20, "right gripper"),
        ("bimanual", 26, "right joint 6"),
        ("bimanual", 13, "column 13"),
        ("plain", 3, "column 3"),
    ],
)
def test_labels(layout, column, label):
    assert find_layout(layout).label(column) == label


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_found_by_the_name_that_they_and_their_frames_have(name):
    layout = find_layout(name)
    assert (layout.name, layout.frame(32).layout) == (name, name)


def test_unknown_layout_lists_the_known():
    with pytest.raises(ValueError, match="layout: expected one of plain, bimanual, mobile, robodojo, got 'trimanual'"):
        find_layout("trimanual")
