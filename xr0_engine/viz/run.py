"""A run of the executor: what the robot sees, what is planned, asked and told, when it came, and where chunks meet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.executor import Recording
from xr0_engine.robot.layouts import LAYOUTS, PLAIN
from xr0_engine.types import Observation
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


BETWEEN_S = 1.0


class RunView:
    """A recorder for an Executor, beside or instead of a Recorder's file; a context manager.

    Entities, on the timeline `time`, seconds from the first request or command on; of several runs, the next begins
    BETWEEN_S after the last:

    camera/VIEW: pictures that inferences start from; attention/VIEW: where their actions look, if asked. state/GROUP:
    the proprio state then. commands/GROUP: what the robot was told. plan/N/GROUP: chunks as they come, each from its
    first step on; N keeps those apart that overlap. prefix/GROUP: the actions that a chunk was given. delay/*:
    milliseconds from observation to chunk, and how much of it the prefix covers, at the request's time. seam/UNIT: the
    largest step between two commands of different chunks. lateness: milliseconds that a command came after it was due.
    events: chunks, what was lost, a guard's warnings, and the report.

    target, title, patient, errors: as in Sink; its drops are `dropped`.
    """

    def __init__(self, target: str | Path, title: str, patient: bool = False) -> None:
        self.title = title
        self._sink: Sink[_Entry] = Sink(target, "xr0 run", title, _Page().draw, patient)

    @property
    def dropped(self) -> int:
        return self._sink.dropped

    def write(self, kind: str, **fields: Any) -> None:
        """A line of a recording: see executor/recording.py."""
        self._sink.put((kind, fields))

    def saw(self, number: int, observation: Observation) -> None:
        """What inference `number` starts from."""
        self._sink.put(("saw", {"number": number, "observation": observation}), has_pictures=True)

    def attended(self, pictures: Mapping[str, np.ndarray]) -> None:
        """View -> (H, W, 3) uint8, of the inference that was seen last: where its actions look (viz/attention.py)."""
        self._sink.put(("attention", {"pictures": pictures}), has_pictures=True)

    def close(self) -> None:
        """Write what is left. Errors as Sink.close."""
        self._sink.close()

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()


def replayed(recording: Recording, target: str | Path) -> None:
    """A recording that was read back, as RunView would have shown it but for what the robot saw. Errors as in Sink."""
    with RunView(target, recording.header["title"], patient=True) as view:
        lines = [line for lines in recording.lines.values() for line in lines if line["kind"] != "session"]
        rate_hz = recording.header["settings"]["rate_hz"]
        fields = [recording.header, *sorted(lines, key=lambda line: _moment(line, rate_hz))]
        for line in fields:
            view.write(**line)


def _moment(line: dict[str, Any], rate_hz: float) -> tuple[float, int]:
    """Orders lines as they were written: steps that passed when the first was due, a report last."""
    if line["kind"] == "report":
        return np.inf, 0
    if line["kind"] == "missed":
        return line["first"] / rate_hz, line["first"]
    return line["time_s"], line.get("step", line.get("number", 0))


_Entry = tuple[str, dict[str, Any]]


class _Page:
    """What has been drawn so far; used by the sink's thread alone."""

    def __init__(self) -> None:
        # What the timeline's zero is on the executor's clock; where the next run begins on the timeline, and where this
        # one is.
        self._zero_s: float | None = None
        self._begins_s = self._latest_s = self._now_s = 0.0
        # When the last observation was taken, on the timeline.
        self._seen_s = 0.0
        self._rate_hz = 1.0
        self._groups: list[Group] = []
        self._state_groups: list[Group] | None = None
        self._requests: dict[int, dict[str, Any]] = {}
        self._last: dict[str, Any] | None = None
        self._views: list[str] = []
        self._not_shown: set[str] = set()
        self._said: str | None = None
        self._shows_attention = False

    def draw(self, stream: RecordingStream, entry: _Entry) -> None:
        kind, fields = entry
        # A warning's time is that of the observation that it is about.
        time_s = None if kind == "warning" else fields.get("time_s")
        if time_s is None:
            stream.set_time(TIME, duration=self._now_s)
        else:
            self._at(stream, time_s)
        getattr(self, f"_draw_{kind}")(stream, fields)

    def _at(self, stream: RecordingStream, time_s: float) -> None:
        if self._zero_s is None:
            self._zero_s = time_s - self._begins_s
        self._now_s = time_s - self._zero_s
        self._latest_s = max(self._latest_s, self._now_s)
        stream.set_time(TIME, duration=self._now_s)

    def _seconds(self, step: int) -> float:
        return step / self._rate_hz - (self._zero_s or 0.0)

    def _draw_session(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        layout, width = LAYOUTS.get(fields["layout"], PLAIN), fields["width"]
        self._rate_hz, self._groups = fields["settings"]["rate_hz"], groups_of(layout, width)
        self._frame = layout.frame(width)
        if self._zero_s is not None:
            self._begins_s = self._now_s = self._latest_s + BETWEEN_S
        self._zero_s, self._last, self._plans, self._requests = None, None, Plans(["plan"], self._groups), {}
        for group in self._groups:
            style(stream, ("commands",), group, None, 2.0)
            style(stream, ("prefix",), group, PREFIX_COLOR, 3.5)
        self._arrange(stream)

    def _draw_inference(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        self._requests[fields["number"]] = fields

    def _draw_saw(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        observation: Observation = fields["observation"]
        request = self._requests.get(fields["number"])
        if request is not None:
            self._seen_s = request["observed_s"] - (self._zero_s or 0.0)
        stream.set_time(TIME, duration=self._seen_s)
        if self._state_groups is None:
            self._begin(stream, observation)
        if observation.instruction != self._said:
            self._said = observation.instruction
            _say(stream, f"instruction: {observation.instruction}")
        self._show(stream, observation.images, "camera")
        state = np.atleast_2d(observation.state)[-1]
        assert self._state_groups is not None
        log_row(stream, ("state",), self._state_groups, state)

    def _draw_attention(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        stream.set_time(TIME, duration=self._seen_s)
        self._show(stream, fields["pictures"], "attention")
        if not self._shows_attention:
            self._shows_attention = True
            self._arrange(stream)

    def _show(self, stream: RecordingStream, pictures: Mapping[str, object], kind: str) -> None:
        """A view that cannot be shown is told the first time."""
        for view, fault in log_pictures(stream, pictures, kind=kind).items():
            if view not in self._not_shown:
                self._not_shown.add(view)
                _say(stream, f"view {view} is not shown: {fault}", "WARN")

    def _begin(self, stream: RecordingStream, observation: Observation) -> None:
        """What the first observation tells of all others."""
        width = np.atleast_2d(observation.state).shape[-1]
        same = self._groups if width == self._frame.width else groups_of(PLAIN, width)
        self._state_groups, self._views = same, list(observation.images)
        for group in same:
            style(stream, ("state",), group, STATE_COLOR, 3.0)
        self._arrange(stream)

    def _draw_chunk(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        import rerun

        rows, first, given = np.array(fields["rows"]), fields["first_step"], fields["prefix_length"]
        first_s, period_s = self._seconds(first), 1 / self._rate_hz
        self._plans.send(stream, first_s, period_s, rows)
        if given:
            send_rows(stream, ("prefix",), self._groups, first_s + period_s * np.arange(given), rows[:given])
        takeover = "came too late for any" if fields["takeover"] is None else f"takes over at step {fields['takeover']}"
        text = f"chunk {fields['number']}: {len(rows)} actions from step {first}, prefix {given}, {takeover}"
        request = self._requests.pop(fields["number"], None)
        if request is not None:
            delay_ms = 1e3 * (fields["finished_s"] - request["observed_s"])
            text += f", {delay_ms:.0f} ms after its observation"
            self._at(stream, request["time_s"])
            stream.log("delay/observation_to_chunk", rerun.Scalars(delay_ms))
            stream.log("delay/covered_by_prefix", rerun.Scalars(1e3 * given / self._rate_hz))
        self._at(stream, fields["time_s"])
        late = f", {fields['late']} too late" if fields["late"] else ""
        _say(stream, text + late, "WARN" if late or fields["takeover"] is None else "INFO")

    def _draw_lost(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        # One that hangs may still come.
        if fields["reason"] != "hung":
            self._requests.pop(fields["number"], None)
        _say(stream, f"inference {fields['number']} {fields['reason']}: {fields['detail']}", "WARN")

    def _draw_step(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        import rerun

        row, last = np.array(fields["row"]), self._last
        log_row(stream, ("commands",), self._groups, row)
        stream.log("lateness", rerun.Scalars(1e3 * (fields["time_s"] - fields["step"] / self._rate_hz)))
        if last is None or fields["source"] != last["source"]:
            says = {"chunk": "executes a chunk", "hold": "holds: no action"}.get(fields["source"], fields["source"])
            _say(stream, f"step {fields['step']}: {says}", "WARN" if fields["source"] == "hold" else "INFO")
        if last is not None and fields["step"] == last["step"] + 1 and _is_seam(last, fields):
            jump = np.abs(self._frame.difference(row, np.array(last["row"])))
            for unit in sorted({group.unit for group in self._groups}):
                columns = [index for group in self._groups if group.unit == unit for index in group.indices]
                stream.log(["seam", unit.replace(" ", "_")], rerun.Scalars(jump[columns].max()))
        self._last = fields

    def _draw_missed(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        stream.set_time(TIME, duration=self._seconds(fields["first"]))
        _say(stream, f"{fields['count']} steps from {fields['first']} on passed without a command", "ERROR")

    def _draw_clock(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        self._last = None
        _say(stream, "the clock went backwards", "ERROR")

    def _draw_warning(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        passed = f"{fields['value']:.3g}, above {fields['threshold']:.3g}"
        _say(stream, f"guard, {fields['name']}: {fields['detail']} ({passed})", "WARN")

    def _draw_report(self, stream: RecordingStream, fields: dict[str, Any]) -> None:
        counts = ", ".join(f"{count} {name}" for name, count in fields["counts"].items() if count)
        _say(stream, f"ended: {fields['ended']}; {counts}")

    def _arrange(self, stream: RecordingStream) -> None:
        """How the viewer shows it at first."""
        import rerun.blueprint as rrb

        curves = views_of_curves(self._groups, [("commands",), ("state",), ("prefix",), *plans_under(["plan"])])
        beside: list[Any] = [
            rrb.TimeSeriesView(origin="/delay", name="delay (ms)"),
            rrb.TimeSeriesView(origin="/seam", name="steps at seams"),
            rrb.TimeSeriesView(origin="/lateness", name="commands after they were due (ms)"),
        ]
        beside.append(rrb.TextLogView(origin="/events", name="events"))
        below = rrb.Horizontal(*beside, column_shares=[1, 1, 1, 2])
        kinds = ("camera", "attention") if self._shows_attention else ("camera",)
        send_blueprint(
            stream, beside_pictures(self._views, rrb.Vertical(curves, below, row_shares=[3, 1]), kinds=kinds)
        )


def _is_seam(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether one chunk follows another there. Standing still between them is none."""
    return before["source"] == after["source"] == "chunk" and before["chunk"] != after["chunk"]


def _say(stream: RecordingStream, text: str, level: str = "INFO") -> None:
    import rerun

    stream.log("events", rerun.TextLog(text, level=level))
