"""Layouts of actions: what the columns are, what a chunk is anchored at, how two actions compare. NumPy only.

A layout is one object in LAYOUTS; embodiment profiles, a server's metadata and recordings hold its name.

A chunk of layout `bimanual` is anchored at the pose of its observation (spec section 3.4), so two chunks cannot be
compared or joined as they are. The executor keeps every action as a row in one fixed frame: the same 32 columns,
anchored at the world's origin, which makes positions, joints and grippers absolute and rotations the axis-angle of the
absolute rotation. Layout `plain` keeps its actions as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np

from xr0_engine.robot import mobile
from xr0_engine.robot.decode import (
    BIMANUAL_COLUMNS,
    LEFT,
    RIGHT,
    ArmPose,
    BimanualPose,
    anchor,
    recover,
    rotation_exp,
    rotation_log,
)

JOINTS = ("waist", "shoulder", "elbow", "forearm roll", "wrist angle", "wrist rotate")


@runtime_checkable
class Pose(Protocol):
    """Where a robot is, as its layout's chunks are anchored at it."""

    def state(self) -> np.ndarray:
        """The proprio state, (1, S) float32."""


class Frame:
    """How the actions of a layout compare: as they are, unless a layout's own frame says otherwise.

    layout: its name. width: A. angular: (A,) bool, columns of axis-angle rotations. delta: (A,) bool, columns that say
    how far to move in one step instead of where to: at rest they are 0. held: (A,) bool, columns with nothing between
    their values, such as a gripper that is open or closed: each is held until the next action, never interpolated.
    velocity: (A,) bool, columns of velocities: at rest they are 0 too, but they are interpolated and do not add up.

    Raises ValueError for columns outside the width, or that are both delta and held.
    """

    def __init__(
        self,
        layout: str,
        width: int,
        angular: Iterable[int] = (),
        delta: Iterable[int] = (),
        held: Iterable[int] = (),
        velocity: Iterable[int] = (),
    ) -> None:
        self.layout, self.width = layout, width
        self.angular = _mask("angular", angular, width)
        self.velocity = _mask("velocity", velocity, width)
        self.delta = self.held = np.zeros(width, bool)
        self.mark(delta, held)

    def mark(self, delta: Iterable[int] = (), held: Iterable[int] = ()) -> None:
        """Make these columns delta and held too. Errors as in the constructor."""
        self.delta = self.delta | _mask("delta_columns", delta, self.width)
        self.held = self.held | _mask("held_columns", held, self.width)
        if both := np.flatnonzero(self.delta & self.held).tolist():
            raise ValueError(f"held_columns: expected none of delta_columns, which become 0 at rest, got {both}")

    @property
    def zero_at_rest(self) -> np.ndarray:
        """(A,) bool."""
        return self.delta | self.velocity

    def absolute(self, actions: np.ndarray, origin: Pose | None) -> np.ndarray:
        """A chunk (T, A) as rows (T, A) float64. Raises ValueError for another shape or values that are not finite."""
        rows = np.array(actions, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.width or len(rows) == 0:
            raise ValueError(f"actions: expected shape (T, {self.width}), got {rows.shape}")
        if not np.isfinite(rows).all():
            raise ValueError("actions: expected finite values, got NaN or infinity")
        return rows

    def anchored(self, rows: np.ndarray, origin: Pose | None) -> np.ndarray:
        """The inverse of absolute: rows (P, A) as actions in the frame of a new observation, (P, A) float32."""
        return rows.astype(np.float32)

    def start(self, origin: Pose | None) -> np.ndarray | None:
        """The row (A,) at which the robot stands, if its pose tells."""
        return None

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """From reference to row, (A,), per column; for rotations the axis-angle of the turn between them."""
        return row - reference

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        """The inverse of difference: the row (A,) that differs so much from `row`."""
        return row + difference


class PlainFrame(Frame):
    """Actions that are not anchored. delta_columns: those that say how far to move, not where to; held_columns: those
    with nothing between their values. See Frame, also for the errors."""

    def __init__(self, width: int, delta_columns: Iterable[int] = (), held_columns: Iterable[int] = ()) -> None:
        super().__init__("plain", width, delta=delta_columns, held=held_columns)


def _mask(name: str, columns: Iterable[int], width: int) -> np.ndarray:
    chosen = list(columns)
    if any(not 0 <= column < width for column in chosen):
        raise ValueError(f"{name}: expected 0 to {width - 1}, got {chosen}")
    mask = np.zeros(width, bool)
    mask[chosen] = True
    return mask


_AT_ORIGIN = ArmPose(np.zeros(3), np.eye(3), np.zeros(6), np.zeros(1))
_WORLD = BimanualPose(_AT_ORIGIN, _AT_ORIGIN)
_ROTATIONS = [column for arm in (LEFT, RIGHT) for column in range(BIMANUAL_COLUMNS)[arm.rotation]]
_MOBILE_AT_ORIGIN = mobile.MobileArm(np.zeros(3), np.eye(3), np.zeros(1))
_MOBILE_WORLD = mobile.MobilePose(_MOBILE_AT_ORIGIN, _MOBILE_AT_ORIGIN)


class AnchoredFrame(Frame):
    """Rows are actions anchored at the world's origin. rotations: the columns of axis-angle rotations, three by three.

    world: the pose at that origin, of the kind that the layout's chunks are anchored at. anchor, recover: of poses of
    that kind, as those of decode.py. Otherwise see Frame.
    """

    def __init__(
        self,
        layout: str,
        width: int,
        rotations: list[int],
        world: Pose,
        anchor: Callable[[Any, Any], np.ndarray],
        recover: Callable[[np.ndarray, Any], Any],
        held: Iterable[int] = (),
        velocity: Iterable[int] = (),
    ) -> None:
        super().__init__(layout, width, angular=rotations, held=held, velocity=velocity)
        self._rotations, self._world = rotations, world
        self._anchor, self._recover = anchor, recover

    def absolute(self, actions: np.ndarray, origin: Pose | None) -> np.ndarray:
        rows = super().absolute(actions, origin)
        return self._anchor(self._recover(rows, self._required(origin)), self._world)

    def anchored(self, rows: np.ndarray, origin: Pose | None) -> np.ndarray:
        return self._anchor(self._recover(rows, self._world), self._required(origin)).astype(np.float32)

    def start(self, origin: Pose | None) -> np.ndarray | None:
        return self.absolute(np.zeros((1, self.width)), origin)[0]

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        change = row - reference
        turns = np.swapaxes(self._matrices(reference), -1, -2) @ self._matrices(row)
        change[self._rotations] = rotation_log(turns).ravel()
        return change

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        result = row + difference
        result[self._rotations] = rotation_log(self._matrices(row) @ self._matrices(difference)).ravel()
        return result

    def _matrices(self, row: np.ndarray) -> np.ndarray:
        return rotation_exp(row[self._rotations].reshape(-1, 3))

    def _required(self, origin: Pose | None) -> Pose:
        if not isinstance(origin, type(self._world)):
            raise ValueError(
                f"origin: expected the robot's pose at the observation (layout {self.layout}), got {origin!r:.80}"
            )
        return origin


class BimanualFrame(AnchoredFrame):
    """Layout `bimanual`. held_columns: see Frame."""

    def __init__(self, held_columns: Iterable[int] = ()) -> None:
        super().__init__("bimanual", BIMANUAL_COLUMNS, _ROTATIONS, _WORLD, anchor, recover, held=held_columns)


class MobileFrame(AnchoredFrame):
    """A layout of 60 columns; an absolute gripper is one in the rows too, of any origin."""

    def __init__(self, layout: str, columns: mobile.Columns) -> None:
        super().__init__(
            layout,
            mobile.MOBILE_COLUMNS,
            columns.rotations,
            _MOBILE_WORLD,
            partial(mobile.anchor, columns=columns),
            partial(mobile.recover, columns=columns),
            velocity=range(mobile.MOBILE_COLUMNS)[columns.base_velocity or slice(0)],
        )
        self._columns = columns

    def start(self, origin: Pose | None) -> np.ndarray | None:
        row = super().start(origin)
        assert row is not None
        if self._columns.gripper_is_absolute:
            pose = self._required(origin)
            assert isinstance(pose, mobile.MobilePose)
            row[self._columns.left.gripper], row[self._columns.right.gripper] = (
                pose.left.gripper[0],
                pose.right.gripper[0],
            )
        return row


@dataclass(frozen=True)
class Column:
    """What an action column moves. group: what it shares an axis with. name: within the group, empty if it is alone.
    label: its name where no groups are shown."""

    index: int
    group: str
    name: str
    unit: str
    label: str


@dataclass(frozen=True, eq=False)
class Layout:
    """frame: action width -> how actions compare. columns: those with a name, as they are shown; none: known by number.
    active_columns: those that a model sees and sets whatever its statistics say; None: it is for the statistics to say.

    rest: a pose to stand at, of the kind that chunks are anchored at; None: chunks are not anchored. described_by: the
    fields that map columns in a dataset's description (training/data/description.py). mobile: where the parts of a
    robot with waist and base stand; None: the layout is of another kind.
    """

    name: str
    frame: Callable[[int], Frame]
    described_by: tuple[str, ...]
    columns: tuple[Column, ...] = ()
    rest: Pose | None = None
    active_columns: tuple[int, ...] | None = None
    mobile: mobile.Columns | None = None

    def frame_of(self, width: int, step_columns: Iterable[int] = (), two_valued_columns: Iterable[int] = ()) -> Frame:
        """The frame for a robot whose profile names such columns. Raises ValueError for columns outside the width."""
        frame = self.frame(width)
        frame.mark(step_columns, two_valued_columns)
        return frame

    def label(self, column: int) -> str:
        return next((known.label for known in self.columns if known.index == column), f"column {column}")

    def panels(self, active_columns: np.ndarray) -> list[list[Column]]:
        """The active columns, each group by itself. active_columns: (A,) bool."""
        active = np.flatnonzero(active_columns).tolist()
        unnamed = (Column(index, f"column {index}", "", "robot units", f"column {index}") for index in active)
        shown = (column for column in self.columns or unnamed if column.index in active)
        return [list(panel) for _, panel in groupby(shown, key=lambda column: column.group)]


def _bimanual_columns() -> Iterator[Column]:
    """The columns of both arms (spec section 3.4), as they are shown; the others are reserved."""
    for side, arm in (("left", LEFT), ("right", RIGHT)):
        for kind, unit, part, names, labels in (
            ("position", "m", arm.position, ("x", "y", "z"), ("x", "y", "z")),
            ("rotation", "rad", arm.rotation, ("x", "y", "z"), ("rx", "ry", "rz")),
            ("joints", "rad", arm.joints, JOINTS, [f"joint {number}" for number in range(1, 7)]),
            ("gripper", "robot units", arm.gripper, ("",), ("gripper",)),
        ):
            for index, name, label in zip(range(BIMANUAL_COLUMNS)[part], names, labels, strict=True):
                yield Column(index, f"{side} {kind}", name, unit, f"{side} {label}")


def _mobile_columns(columns: mobile.Columns) -> Iterator[Column]:
    """The columns in use, as they are shown; the others are reserved (spec section 8)."""
    for side, arm in (("left", columns.left), ("right", columns.right)):
        for kind, unit, part, labels in (
            ("position", "m", arm.position, "xyz"),
            ("rotation", "rad", arm.rotation, ("rx", "ry", "rz")),
        ):
            indices = range(mobile.MOBILE_COLUMNS)[part]
            for index, name, label in zip(indices, "xyz", labels, strict=True):
                yield Column(index, f"{side} {kind}", name, unit, f"{side} {label}")
        yield Column(arm.gripper, f"{side} gripper", "", "robot units", f"{side} gripper")
    if columns.waist is not None:
        yield Column(columns.waist, "waist", "", "robot units", "waist")
    if columns.base_velocity is not None:
        for index, name in zip(range(mobile.MOBILE_COLUMNS)[columns.base_velocity], ("1", "2", "3"), strict=True):
            yield Column(index, "base velocity", name, "robot units", f"base velocity {name}")


def _mobile(name: str, columns: mobile.Columns) -> Layout:
    shown = tuple(_mobile_columns(columns))
    return Layout(
        name,
        lambda width: MobileFrame(name, columns),
        described_by=("arms",),
        columns=shown,
        rest=_MOBILE_WORLD,
        active_columns=tuple(sorted(column.index for column in shown)),
        mobile=columns,
    )


PLAIN = Layout("plain", PlainFrame, described_by=("state", "action"))
BIMANUAL = Layout(
    "bimanual",
    lambda width: BimanualFrame(),
    described_by=("arms",),
    columns=tuple(_bimanual_columns()),
    rest=_WORLD,
    active_columns=tuple(sorted(column.index for column in _bimanual_columns())),
)
MOBILE, ROBODOJO = _mobile("mobile", mobile.MOBILE), _mobile("robodojo", mobile.ROBODOJO)
LAYOUTS = {layout.name: layout for layout in (PLAIN, BIMANUAL, MOBILE, ROBODOJO)}
"""Name -> layout. A new one needs its entry here, and nothing elsewhere."""


def find_layout(name: str) -> Layout:
    """Raises ValueError that lists the known names."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]
