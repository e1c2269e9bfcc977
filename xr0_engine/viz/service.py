"""A server's requests: what each client showed, and the chunk that it got."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xr0_engine.robot.layouts import LAYOUTS, PLAIN
from xr0_engine.serve.protocol import Request
from xr0_engine.types import ActionChunk, Observation, RobotInfo
from xr0_engine.viz.curves import (
    PREFIX_COLOR,
    STATE_COLOR,
    TIME,
    Group,
    Plans,
    beside_pictures,
    groups_of,
    log_pictures,
    log_row,
    plans_under,
    send_blueprint,
    send_rows,
    style,
    views_of_curves,
)
from xr0_engine.viz.sink import Sink

if TYPE_CHECKING:
    from rerun import RecordingStream

MOST_TABS = 6
"""The newest clients, which the viewer shows at first; others are found by their entities."""


class ServiceView:
    """A Watch for a Server. Each client's entities are under client/NUMBER, on the timeline `time`, seconds since the
    view was made, at the time of the answer:

    camera/VIEW and state/GROUP: of the observation. plan/N/GROUP: chunks as they were sent, anchored where their layout
    anchors them, each action at the time that it would be for if the observation were of now; N keeps those apart that
    overlap. prefix/GROUP: those of their actions that were given. timing/NAME: milliseconds, in all, in the engine,
    waiting. said: the instruction, when it changes; a view that cannot be shown, the first time.

    target, title, errors: as in Sink; it drops what comes too fast.
    """

    def __init__(self, target: str | Path, title: str) -> None:
        self._began_s = time.monotonic()
        self._sink: Sink[_Answer] = Sink(target, "xr0 serve", title, _Pages().draw)

    def answered(
        self, client: int, request: Request, chunk: ActionChunk, timing_ms: Mapping[str, float], robot: RobotInfo
    ) -> None:
        """As in serve.service.Watch."""
        answer = _Answer(time.monotonic() - self._began_s, client, request, chunk, timing_ms, robot)
        self._sink.put(answer, has_pictures=True)

    @property
    def dropped(self) -> int:
        return self._sink.dropped

    def close(self) -> None:
        """Write what is left. Errors as Sink.close."""
        self._sink.close()


@dataclass(frozen=True, eq=False)
class _Answer:
    time_s: float
    client: int
    request: Request
    chunk: ActionChunk
    timing_ms: Mapping[str, float]
    robot: RobotInfo


@dataclass
class _Page:
    """What is drawn of one client so far. views: of its first observation. not_shown: those that it was told of."""

    root: tuple[str, ...]
    views: list[str]
    groups: list[Group]
    plans: Plans
    state_groups: list[Group]
    robot_type: str
    said: str | None = None
    not_shown: set[str] = field(default_factory=set)


class _Pages:
    """Used by the sink's thread alone."""

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}

    def draw(self, stream: RecordingStream, answer: _Answer) -> None:
        import rerun

        page = self._pages.get(answer.client)
        # A client may be another robot with each request.
        if page is None or page.robot_type != answer.chunk.robot_type:
            page = self._begin(stream, answer)
        observation, chunk, root = answer.request.observation, answer.chunk, page.root
        period_s = 1 / answer.robot.control_rate_hz
        page.plans.send(stream, answer.time_s, period_s, chunk.actions)
        if given := chunk.prefix_length:
            times_s = answer.time_s + period_s * np.arange(given)
            send_rows(stream, [*root, "prefix"], page.groups, times_s, chunk.actions[:given])
        stream.set_time(TIME, duration=answer.time_s)
        log_row(stream, [*root, "state"], page.state_groups, np.atleast_2d(observation.state)[-1])
        for name, milliseconds in answer.timing_ms.items():
            stream.log([*root, "timing", name], rerun.Scalars(milliseconds))
        said = "(sent as tokens)"
        if isinstance(observation, Observation):
            faults = log_pictures(stream, observation.images, root)
            for view in faults.keys() - page.not_shown:
                page.not_shown.add(view)
                text = f"view {view} is not shown: {faults[view]}"
                stream.log([*root, "said"], rerun.TextLog(text, level="WARN"))
            said = observation.instruction
        if said != page.said:
            page.said = said
            stream.log([*root, "said"], rerun.TextLog(said))

    def _begin(self, stream: RecordingStream, answer: _Answer) -> _Page:
        observation, chunk = answer.request.observation, answer.chunk
        layout, width = LAYOUTS.get(answer.robot.layout, PLAIN), chunk.actions.shape[1]
        state_width = np.atleast_2d(observation.state).shape[-1]
        groups, root = groups_of(layout, width, chunk.active_columns), ("client", str(answer.client))
        page = _Page(
            root,
            list(observation.images) if isinstance(observation, Observation) else [],
            groups,
            Plans([*root, "plan"], groups),
            groups_of(layout if state_width == width else PLAIN, state_width),
            chunk.robot_type,
        )
        for group in page.groups:
            style(stream, [*page.root, "prefix"], group, PREFIX_COLOR, 3.5)
        for group in page.state_groups:
            style(stream, [*page.root, "state"], group, STATE_COLOR, 3.0)
        self._pages.pop(answer.client, None)
        self._pages[answer.client] = page
        while len(self._pages) > MOST_TABS:
            del self._pages[next(iter(self._pages))]
        self._arrange(stream)
        return page

    def _arrange(self, stream: RecordingStream) -> None:
        import rerun
        import rerun.blueprint as rrb

        tabs = []
        for client, page in self._pages.items():
            entities = [[*page.root, "prefix"], *plans_under([*page.root, "plan"])]
            state = views_of_curves(page.state_groups, [[*page.root, "state"]])
            timing = rrb.TimeSeriesView(origin=rerun.new_entity_path([*page.root, "timing"]), name="timing (ms)")
            said = rrb.TextLogView(origin=rerun.new_entity_path([*page.root, "said"]), name="instruction")
            below = rrb.Horizontal(timing, said)
            curves = rrb.Tabs(views_of_curves(page.groups, entities), rrb.Vertical(state, name="state"))
            beside = rrb.Vertical(curves, below, row_shares=[3, 1])
            tabs.append(beside_pictures(page.views, beside, page.root, f"client {client}, {page.robot_type}"))
        send_blueprint(stream, rrb.Tabs(*tabs, active_tab=len(tabs) - 1))
