"""Columns of states and actions as curves: an entity for each group of them, which share an axis."""

from __future__ import annotations

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
MOST_GROUPS_IN_A_ROW = 4
TIME = "time"
"""The timeline of seconds."""


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


def groups_of(layout: Layout, width: int) -> list[Group]:
    """A layout's groups among columns 0 to width - 1; one for all columns where the layout names none."""
    if layout.columns and max(column.index for column in layout.columns) < width:
        panels = layout.panels(np.ones(width, bool))
    else:
        names = [f"column {index}" for index in range(width)]
        panels = [[Column(index, "columns", name, "robot units", name) for index, name in enumerate(names)]]
    return [
        Group(panel[0].group.replace(" ", "_"), panel[0].group, panel[0].unit, tuple(panel))
        for panel in panels
        if panel
    ]


def style(stream: RecordingStream, entity: Sequence[str], group: Group, as_points: str | None, width: float) -> None:
    """How a group's curves look: lines in a colour each, or points of one colour. width: in points."""
    import rerun

    count = len(group.columns)
    names = [f"{entity[0]} {name}" for name in group.names]
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

    for group in groups:
        values = rows[:, group.indices]
        stream.send_columns(
            rerun.new_entity_path([*entity, group.name]),
            indexes=[rerun.TimeColumn(TIME, duration=times_s)],
            columns=rerun.Scalars.columns(scalars=values.ravel()).partition([values.shape[1]] * len(values)),
        )


def log_pictures(stream: RecordingStream, images: Mapping[str, np.ndarray]) -> None:
    """Each view's newest picture, as JPEG, at the stream's time."""
    import rerun

    from xr0_engine.robot.history import newest
    from xr0_engine.serve.images import encode_jpeg

    for view, image in images.items():
        data = encode_jpeg(np.ascontiguousarray(newest(image)), JPEG_QUALITY)
        stream.log(["camera", view], rerun.EncodedImage(contents=data, media_type="image/jpeg"))


def arrange(stream: RecordingStream, views: Sequence[str], beside: Any) -> None:
    """How the viewer shows it at first: the robot's views above each other, and what is beside them."""
    import rerun
    import rerun.blueprint as rrb

    pictures = [rrb.Spatial2DView(origin=rerun.new_entity_path(["camera", view]), name=view) for view in views]
    whole = rrb.Horizontal(rrb.Vertical(*pictures), beside, column_shares=[1, 3]) if pictures else beside
    panels = rrb.SelectionPanel(state="collapsed"), rrb.BlueprintPanel(state="collapsed")
    stream.send_blueprint(rrb.Blueprint(whole, *panels, rrb.TimePanel(state="collapsed")))


def views_of_curves(groups: Sequence[Group], entities: Sequence[Sequence[str]]) -> Any:
    """A grid, a view for each group: what of it the entities hold."""
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
        name="columns",
    )


def _rgb(color: str) -> tuple[int, int, int]:
    """#RRGGBB as numbers."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
