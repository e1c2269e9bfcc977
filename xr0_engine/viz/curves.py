"""Columns of states and actions as curves: an entity for each group of them, which share an axis."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.plot import COLORS
from xr0_engine.robot.layouts import Column, Layout

if TYPE_CHECKING:
    from rerun import RecordingStream

PREFIX_COLOR = "#E69F00"
STATE_COLOR = "#999999"
JPEG_QUALITY = 85
MEDIA_TYPES = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}
"""What files begin with -> of which kind they are."""
MOST_GROUPS_IN_A_ROW = 4
MOST_PLANS = 16
"""Chunks that are drawn beside each other where they overlap."""
TIME = "time"
"""The timeline of seconds."""
STEP = "step"
"""The timeline of a chunk's steps."""


@dataclass(frozen=True)
class Group:
    """Columns that share an axis. name: as an entity has it, without spaces. title: for people."""

    name: str
    title: str
    unit: str
    columns: tuple[Column, ...]

    @property
    def indices(self) -> list[int]:
        return [column.index for column in self.columns]

    @property
    def names(self) -> list[str]:
        return [column.name or self.title for column in self.columns]


def groups_of(layout: Layout, width: int, active: np.ndarray | None = None) -> list[Group]:
    """A layout's groups among columns 0 to width - 1; one for all columns where the layout names none. active: (width,)
    bool, the columns that are shown; None shows all."""
    shown = np.ones(width, bool) if active is None else active
    if layout.columns and max(column.index for column in layout.columns) < width:
        panels = layout.panels(shown)
    else:
        numbers = np.flatnonzero(shown).tolist()
        panels = [[Column(index, "columns", f"column {index}", "robot units", "") for index in numbers]]
    return [
        Group(panel[0].group.replace(" ", "_"), panel[0].group, panel[0].unit, tuple(panel))
        for panel in panels
        if panel
    ]


def style(stream: RecordingStream, entity: Sequence[str], group: Group, as_points: str | None, width: float) -> None:
    """How a group's curves look: lines in a colour each, or points of one colour. width: in points."""
    import rerun

    count = len(group.columns)
    names = [f"{entity[-1]} {name}" for name in group.names]
    if as_points is None:
        colors = [COLORS[index % len(COLORS)] for index in range(count)]
        looks: Any = rerun.SeriesLines(colors=[_rgb(color) for color in colors], names=names, widths=[width] * count)
    else:
        looks = rerun.SeriesPoints(colors=[_rgb(as_points)] * count, names=names, marker_sizes=[width] * count)
    stream.log([*entity, group.name], looks, static=True)


def log_row(stream: RecordingStream, entity: Sequence[str], groups: Sequence[Group], row: np.ndarray) -> None:
    """One row (A,) at the stream's time."""
    import rerun

    for group in groups:
        stream.log([*entity, group.name], rerun.Scalars(row[group.indices]))


def send_rows(
    stream: RecordingStream, entity: Sequence[str], groups: Sequence[Group], times_s: np.ndarray, rows: np.ndarray
) -> None:
    """Rows (N, A) at their times (N,), on TIME."""
    import rerun

    index = rerun.TimeColumn(TIME, duration=times_s)
    _send(stream, entity, groups, index, rows)


def send_steps(stream: RecordingStream, entity: Sequence[str], groups: Sequence[Group], rows: np.ndarray) -> None:
    """Rows (N, A) of steps 0 to N - 1, on STEP."""
    import rerun

    _send(stream, entity, groups, rerun.TimeColumn(STEP, sequence=range(len(rows))), rows)


def _send(
    stream: RecordingStream, entity: Sequence[str], groups: Sequence[Group], index: Any, rows: np.ndarray
) -> None:
    import rerun

    for group in groups:
        values = rows[:, group.indices]
        stream.send_columns(
            rerun.new_entity_path([*entity, group.name]),
            indexes=[index],
            columns=rerun.Scalars.columns(scalars=values.ravel()).partition([values.shape[1]] * len(values)),
        )


class Plans:
    """Chunks as curves: those that overlap in time beside each other, under ROOT/0, ROOT/1, ..."""

    def __init__(self, root: Sequence[str], groups: Sequence[Group]) -> None:
        self._root, self._groups = root, groups
        # The end of what is drawn at each place, in seconds.
        self._ends_s: list[float] = []

    def send(self, stream: RecordingStream, first_s: float, period_s: float, rows: np.ndarray) -> None:
        """A chunk (T, A), whose first action is for first_s, and every other a period later than the one before."""
        times_s = first_s + period_s * np.arange(len(rows) + 1)
        place = next((place for place, end_s in enumerate(self._ends_s) if end_s < first_s - 1e-6), len(self._ends_s))
        if place == MOST_PLANS:
            place = int(np.argmin(self._ends_s))
        elif place == len(self._ends_s):
            self._ends_s.append(0.0)
            for group in self._groups:
                style(stream, [*self._root, str(place)], group, None, 0.7)
        self._ends_s[place] = float(times_s[-1])
        # Without numbers at its end, the line would go on to the next chunk.
        nothing = np.full((1, rows.shape[1]), np.nan)
        send_rows(stream, [*self._root, str(place)], self._groups, times_s, np.concatenate([rows, nothing]))


def plans_under(root: Sequence[str]) -> list[list[str]]:
    """All that Plans may draw under a root."""
    return [[*root, str(place)] for place in range(MOST_PLANS)]


def log_pictures(
    stream: RecordingStream, images: Mapping[str, object], root: Sequence[str] = (), kind: str = "camera"
) -> dict[str, str]:
    """Each view's newest picture at the stream's time: ROOT/KIND/VIEW. Arrays become JPEG, files go as they are.

    images: view -> what a Client takes. Returns view -> why it cannot be shown, of those that cannot.
    """
    import rerun

    faults = {}
    for view, image in images.items():
        try:
            data, media_type = _as_file(image)
        # Pillow's own for what is too large for a JPEG.
        except (ValueError, OSError) as fault:
            faults[view] = str(fault)
        else:
            stream.log([*root, kind, view], rerun.EncodedImage(contents=data, media_type=media_type))
    return faults


def _as_file(view: object) -> tuple[bytes, str]:
    """A view's newest picture as a file, and of which kind. Raises ValueError for what is none, OSError."""
    from xr0_engine.robot.history import newest
    from xr0_engine.serve.images import encode_jpeg, read_image

    image = view[-1] if isinstance(view, list | tuple) and view else view
    if isinstance(image, bytes):
        for start, media_type in MEDIA_TYPES.items():
            if image.startswith(start):
                return image, media_type
        raise ValueError(f"expected a JPEG or PNG file, got {len(image)} bytes of something else")
    if isinstance(image, np.ndarray):
        image = newest(image)
    return encode_jpeg(np.ascontiguousarray(read_image("image", image, sys.maxsize)), JPEG_QUALITY), "image/jpeg"


def beside_pictures(
    views: Sequence[str],
    beside: Any,
    root: Sequence[str] = (),
    name: str | None = None,
    kinds: Sequence[str] = ("camera",),
) -> Any:
    """A robot's views above each other, and what is beside them. root, kinds: of log_pictures. name: of the whole."""
    import rerun
    import rerun.blueprint as rrb

    pictures = [
        rrb.Spatial2DView(
            origin=rerun.new_entity_path([*root, kind, view]), name=view if kind == "camera" else f"{view}, {kind}"
        )
        for view in views
        for kind in kinds
    ]
    if not pictures:
        return rrb.Vertical(beside, name=name)
    grid = rrb.Grid(*pictures, grid_columns=len(kinds))
    return rrb.Horizontal(grid, beside, column_shares=[len(kinds), 3], name=name)


def send_blueprint(stream: RecordingStream, whole: Any, lists_recordings: bool = False) -> None:
    """Shows that, of the panels around it the time's last line, and the list of recordings if asked to."""
    import rerun.blueprint as rrb

    left: Any = "expanded" if lists_recordings else "collapsed"
    panels = rrb.SelectionPanel(state="collapsed"), rrb.BlueprintPanel(state=left)
    stream.send_blueprint(rrb.Blueprint(whole, *panels, rrb.TimePanel(state="collapsed")))


def views_of_curves(groups: Sequence[Group], entities: Sequence[Sequence[str]], name: str = "columns") -> Any:
    """A grid, a view for each group: what of it the entities hold. name: of the grid."""
    import rerun
    import rerun.blueprint as rrb

    return rrb.Grid(
        *(
            rrb.TimeSeriesView(
                origin="/",
                contents=[f"+ {rerun.new_entity_path([*entity, group.name])}" for entity in entities],
                name=f"{group.title} ({group.unit})",
                plot_legend=rrb.PlotLegend(visible=False),
            )
            for group in groups
        ),
        grid_columns=min(len(groups), MOST_GROUPS_IN_A_ROW),
        name=name,
    )


def _rgb(color: str) -> tuple[int, int, int]:
    """#RRGGBB as numbers."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
