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
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np

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

    Raises ValueError for columns outside the width, or that are both delta and held.
    """

    def __init__(
        self,
        layout: str,
        width: int,
        angular: Iterable[int] = (),
        delta: Iterable[int] = (),
        held: Iterable[int] = (),
    ) -> None:
        self.layout, self.width = layout, width
        self.angular = _mask("angular", angular, width)
        self.delta = self.held = np.zeros(width, bool)
        self.mark(delta, held)

    def mark(self, delta: Iterable[int] = (), held: Iterable[int] = ()) -> None:
        """Make these columns delta and held too. Errors as in the constructor."""
        self.delta = self.delta | _mask("delta_columns", delta, self.width)
        self.held = self.held | _mask("held_columns", held, self.width)
        if both := np.flatnonzero(self.delta & self.held).tolist():
            raise ValueError(f"held_columns: expected none of delta_columns, which become 0 at rest, got {both}")

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
    return np.isin(np.arange(width), chosen)


_AT_ORIGIN = ArmPose(np.zeros(3), np.eye(3), np.zeros(6), np.zeros(1))
_WORLD = BimanualPose(_AT_ORIGIN, _AT_ORIGIN)
_ROTATIONS = [column for arm in (LEFT, RIGHT) for column in range(BIMANUAL_COLUMNS)[arm.rotation]]


class BimanualFrame(Frame):
    """Layout `bimanual`: rows are actions anchored at the world's origin. held_columns: see Frame."""

    def __init__(self, held_columns: Iterable[int] = ()) -> None:
        super().__init__("bimanual", BIMANUAL_COLUMNS, angular=_ROTATIONS, held=held_columns)

    def absolute(self, actions: np.ndarray, origin: Pose | None) -> np.ndarray:
        return anchor(recover(super().absolute(actions, origin), _required(origin)), _WORLD)

    def anchored(self, rows: np.ndarray, origin: Pose | None) -> np.ndarray:
        return anchor(recover(rows, _WORLD), _required(origin)).astype(np.float32)

    def start(self, origin: Pose | None) -> np.ndarray | None:
        return self.absolute(np.zeros((1, self.width)), origin)[0]

    def difference(self, row: np.ndarray, reference: np.ndarray) -> np.ndarray:
        change = row - reference
        change[_ROTATIONS] = rotation_log(np.swapaxes(_rotations(reference), -1, -2) @ _rotations(row)).ravel()
        return change

    def moved(self, row: np.ndarray, difference: np.ndarray) -> np.ndarray:
        result = row + difference
        result[_ROTATIONS] = rotation_log(_rotations(row) @ _rotations(difference)).ravel()
        return result


def _rotations(row: np.ndarray) -> np.ndarray:
    return rotation_exp(row[_ROTATIONS].reshape(2, 3))


def _required(origin: Pose | None) -> BimanualPose:
    if not isinstance(origin, BimanualPose):
        raise ValueError(f"origin: expected the robot's pose at the observation (layout bimanual), got {origin!r:.80}")
    return origin


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
    fields that map columns in a dataset's description (training/data/description.py).
    """

    name: str
    frame: Callable[[int], Frame]
    described_by: tuple[str, ...]
    columns: tuple[Column, ...] = ()
    rest: Pose | None = None
    active_columns: tuple[int, ...] | None = None

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


PLAIN = Layout("plain", PlainFrame, described_by=("state", "action"))
BIMANUAL = Layout(
    "bimanual",
    lambda width: BimanualFrame(),
    described_by=("arms",),
    columns=tuple(_bimanual_columns()),
    rest=_WORLD,
    active_columns=tuple(sorted(column.index for column in _bimanual_columns())),
)
LAYOUTS = {layout.name: layout for layout in (PLAIN, BIMANUAL)}
"""Name -> layout. A new one needs its entry here, and nothing elsewhere."""


def find_layout(name: str) -> Layout:
    """Raises ValueError that lists the known names."""
    if name not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {name!r}")
    return LAYOUTS[name]
