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
"""The newest clients, whether they are connected or not, which the viewer shows; others are found by their entities."""


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
        self._sink: Sink[_Answer | _Left] = Sink(target, "xr0 serve", title, _Pages().draw)

    def answered(
        self, client: int, request: Request, chunk: ActionChunk, timing_ms: Mapping[str, float], robot: RobotInfo
    ) -> None:
        """As in serve.service.Watch."""
        answer = _Answer(time.monotonic() - self._began_s, client, request, chunk, timing_ms, robot)
        self._sink.put(answer, has_pictures=True)

    def left(self, client: int) -> None:
        """As in serve.service.Watch."""
        self._sink.put(_Left(client))

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


@dataclass(frozen=True)
class _Left:
    client: int


@dataclass
class _Page:
    """What is drawn of a client as one robot. views: of its first observation."""

    root: tuple[str, ...]
    views: list[str]
    groups: list[Group]
    plans: Plans
    state_groups: list[Group]


@dataclass
class _Client:
    """pages: by robot type, as it may be another with each request. not_shown: views that it was told of."""

    pages: dict[str, _Page] = field(default_factory=dict)
    said: str | None = None
    not_shown: set[str] = field(default_factory=set)
    is_connected: bool = True


class _Pages:
    """Used by the sink's thread alone."""

    def __init__(self) -> None:
        # By their numbers: those that are connected, and those that are shown.
        self._clients: dict[int, _Client] = {}
        # Client and robot type of each tab.
        self._shown: list[tuple[int, str]] = []

    def draw(self, stream: RecordingStream, entry: _Answer | _Left) -> None:
        if isinstance(entry, _Answer):
            self._draw_answer(stream, entry)
        elif entry.client in self._clients:
            self._clients[entry.client].is_connected = False
            self._forget()

    def _draw_answer(self, stream: RecordingStream, answer: _Answer) -> None:
        import rerun

        client = self._clients.setdefault(answer.client, _Client())
        page = client.pages.get(answer.chunk.robot_type)
        if page is None:
            page = client.pages[answer.chunk.robot_type] = self._begin(stream, answer)
            self._forget()
            self._arrange(stream)
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
            for view in faults.keys() - client.not_shown:
                client.not_shown.add(view)
                text = f"view {view} is not shown: {faults[view]}"
                stream.log([*root, "said"], rerun.TextLog(text, level="WARN"))
            said = observation.instruction
        if said != client.said:
            client.said = said
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
        )
        for group in page.groups:
            style(stream, [*page.root, "prefix"], group, PREFIX_COLOR, 3.5)
        for group in page.state_groups:
            style(stream, [*page.root, "state"], group, STATE_COLOR, 3.0)
        return page

    def _newest(self) -> list[int]:
        return sorted(self._clients)[-MOST_TABS:]

    def _forget(self) -> None:
        """Who has gone and is not shown."""
        newest = self._newest()
        for number in [number for number, client in self._clients.items() if not client.is_connected]:
            if number not in newest:
                del self._clients[number]

    def _arrange(self, stream: RecordingStream) -> None:
        """Nothing is sent where the same is shown as before: the viewer would forget what somebody has arranged."""
        import rerun
        import rerun.blueprint as rrb

        shown = [(number, robot_type) for number in self._newest() for robot_type in self._clients[number].pages]
        if shown == self._shown:
            return
        self._shown = shown
        tabs = []
        for number, robot_type in shown:
            page = self._clients[number].pages[robot_type]
            entities = [[*page.root, "prefix"], *plans_under([*page.root, "plan"])]
            state = views_of_curves(page.state_groups, [[*page.root, "state"]])
            timing = rrb.TimeSeriesView(origin=rerun.new_entity_path([*page.root, "timing"]), name="timing (ms)")
            said = rrb.TextLogView(origin=rerun.new_entity_path([*page.root, "said"]), name="instruction")
            below = rrb.Horizontal(timing, said)
            curves = rrb.Tabs(views_of_curves(page.groups, entities), rrb.Vertical(state, name="state"))
            beside = rrb.Vertical(curves, below, row_shares=[3, 1])
            tabs.append(beside_pictures(page.views, beside, page.root, f"client {number}, {robot_type}"))
        send_blueprint(stream, rrb.Tabs(*tabs, active_tab=len(tabs) - 1))
