"""A recording as a picture: which chunk gave which action, when each was asked for, and when it came."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.executor import Recording
from xr0_engine.plot import COLORS, STYLE
from xr0_engine.robot.layouts import Layout, find_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = 3
EXECUTED, PREFIX, LATE, UNUSED, HELD = COLORS[2], COLORS[4], COLORS[0], "0.88", "0.55"


@dataclass(frozen=True)
class _Window:
    """The part of a recording that is shown, times from its first command or request on."""

    zero_s: float
    start_s: float
    end_s: float
    rate_hz: float
    lines: Mapping[str, list[dict[str, Any]]]

    def at(self, time_s: float) -> float:
        return time_s - self.zero_s

    def at_step(self, step: int) -> float:
        return step / self.rate_hz - self.zero_s


def plot_recording(recording: Recording, path: Path, start_s: float = 0.0, seconds: float = 8.0) -> None:
    """Draw `seconds` of a recording, from start_s after its beginning, as a PNG.

    Raises ValueError if nothing was recorded in that time or the layout is unknown, OSError if path cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    window = _cut(recording, start_s, seconds)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14, 12), layout="constrained")
        figure.suptitle(_title(recording), fontsize=12)
        heights = (3.2, *[1.5] * CURVES, 1.3, 0.8)
        axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        _plot_chunks(axes[0], window)
        _plot_curves(axes[1 : 1 + CURVES], window, recording)
        _plot_delays(axes[-2], window)
        _plot_lateness(axes[-1], window)
        axes[-1].set_xlabel("time (s)")
        margin_s = 0.005 * (window.end_s - window.start_s)
        axes[-1].set_xlim(window.start_s - margin_s, window.end_s + margin_s)
        for panel in axes:
            panel.yaxis.set_label_coords(-0.035, 0.5)
        figure.savefig(path, dpi=110)


def _cut(recording: Recording, start_s: float, seconds: float) -> _Window:
    steps, inferences = recording.lines["step"], recording.lines["inference"]
    rate_hz = recording.header["settings"]["rate_hz"]
    times = [line["time_s"] for line in (*steps[:1], *inferences[:1])]
    if not times:
        raise ValueError("session: expected at least one command or inference, got none")
    zero_s = min(times)
    end_s = min(
        start_s + seconds, max(line["time_s"] for line in (*steps[-1:], *inferences[-1:])) - zero_s + 1 / rate_hz
    )
    if not start_s < end_s:
        raise ValueError(f"start: expected less than the session's {end_s:.1f} s, got {start_s:g}")
    # A chunk that came before the window may reach into it.
    margin_s = max((len(line["rows"]) for line in recording.lines["chunk"]), default=0) / rate_hz
    shown = {
        kind: [
            line
            for line in lines
            if "time_s" not in line or start_s - margin_s <= line["time_s"] - zero_s <= end_s + 1e-9
        ]
        for kind, lines in recording.lines.items()
    }
    return _Window(zero_s, start_s, end_s, rate_hz, shown)


def _title(recording: Recording) -> str:
    settings, report = recording.header["settings"], recording.lines["report"]
    counts = report[-1]["counts"] if report else {}
    unusual = ("held", "missed", "late", "failed", "rejected", "hung", "outdated", "void", "clock_jumps")
    events = ", ".join(f"{counts[name]} {name}" for name in unusual if counts.get(name))
    parts = [recording.header["title"], f"{settings['mode']} at {settings['rate_hz']:g} Hz", events]
    return "   ·   ".join(part for part in parts if part)


def _plot_chunks(axes: Axes, window: _Window) -> None:
    """A bar for each chunk from its first action to its last; what became of the actions by colour."""
    executed: dict[int, list[int]] = {}
    for line in window.lines["step"]:
        if line["source"] == "chunk":
            executed.setdefault(line["chunk"], []).append(line["step"])
    asked = {line["number"]: line for line in window.lines["inference"]}
    period_s = 1 / window.rate_hz
    for chunk in window.lines["chunk"]:
        number, first = chunk["number"], chunk["first_step"]
        spans = [(first, len(chunk["rows"]), UNUSED), (first, chunk["prefix_length"], PREFIX)]
        spans += [(first + chunk["prefix_length"], chunk["late"], LATE)]
        spans += [(*run, EXECUTED) for run in _runs(executed.get(number, []))]
        for step, length, color in spans:
            axes.barh(number, length * period_s, left=window.at_step(step), height=0.62, color=color)
    for number, line in asked.items():
        finished = next((c["finished_s"] for c in window.lines["chunk"] if c["number"] == number), None)
        lost = next((c for c in window.lines["lost"] if c["number"] == number), None)
        end_s = finished if finished is not None else lost["time_s"] if lost else window.zero_s + window.end_s
        axes.plot([window.at(line["time_s"]), window.at(end_s)], [number - 0.45] * 2, color="black", linewidth=1.4)
        axes.plot(window.at(line["observed_s"]), number - 0.45, "o", color="black", markersize=3.5)
        if lost and finished is None and lost["reason"] != "open":
            axes.plot(window.at(end_s), number - 0.45, "x", color=LATE, markersize=6, markeredgewidth=2)
    _shade_held(axes, window)
    numbers = sorted(asked)
    axes.set_ylim((numbers[-1] if numbers else 1) + 0.8, (numbers[0] if numbers else 0) - 1.0)
    axes.set_ylabel("chunk")
    axes.set_yticks(numbers[:: 1 + len(numbers) // 25])
    axes.grid(axis="y", visible=False)
    _legend_of_chunks(axes)


def _legend_of_chunks(axes: Axes) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color="black", marker="o", markersize=3.5, label="observation, then inference"),
        Patch(color=PREFIX, label="prefix (committed)"),
        Patch(color=EXECUTED, label="executed"),
        Patch(color=LATE, label="too late"),
        Patch(color=UNUSED, label="not executed"),
        Patch(color=HELD, alpha=0.25, label="held, no action"),
        Line2D([], [], color=LATE, marker="x", linestyle="", markeredgewidth=2, label="inference failed"),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), handlelength=1.4)


def _plot_curves(grid: Any, window: _Window, recording: Recording) -> None:
    """The columns that move most: every chunk's prediction, and what the robot was told."""
    layout, width = find_layout(recording.header["layout"]), recording.header["width"]
    steps = window.lines["step"]
    rows = np.array([line["row"] for line in steps]) if steps else np.zeros((1, width))
    motion = np.ptp(rows, axis=0)
    # The same rotation has several axis-angles: their curves would show jumps that are none.
    motion[layout.frame(width).angular] = -1
    columns = np.argsort(-motion, kind="stable")[:CURVES]
    names = _names(layout, width)
    times = [window.at_step(line["step"]) for line in steps]
    seams = [
        window.at_step(line["step"])
        for before, line in pairwise(steps)
        if line["source"] == "chunk" and line["chunk"] != before["chunk"]
    ]
    for axes, column in zip(grid, columns, strict=False):
        for chunk in window.lines["chunk"]:
            predicted = np.array(chunk["rows"])[:, column]
            at = [window.at_step(chunk["first_step"] + index) for index in range(len(predicted))]
            axes.plot(at, predicted, color=COLORS[chunk["number"] % len(COLORS)], linewidth=0.9, alpha=0.8)
        axes.plot(times, rows[: len(times), column], ".-", color="black", linewidth=1.2, markersize=3)
        for seam in seams:
            axes.axvline(seam, color="0.4", linewidth=0.7, linestyle=":")
        _shade_held(axes, window)
        axes.set_ylabel(names[column])
    grid[0].set_title("the columns that move most: chunks in colour, commands in black, seams dotted", loc="left")


def _names(layout: Layout, width: int) -> list[str]:
    names = [f"column {column}" for column in range(width)]
    for panel in layout.panels(np.ones(width, bool)):
        for column in panel:
            name = f"{column.group.removesuffix(' joints')} {column.name}".rstrip()
            names[column.index] = f"{name}\n({column.unit})"
    return names


def _plot_delays(axes: Axes, window: _Window) -> None:
    """From observation to chunk, beside the time that the prefix covers."""
    period_ms = 1e3 / window.rate_hz
    asked = {line["number"]: line for line in window.lines["inference"]}
    for chunk in window.lines["chunk"]:
        line = asked.get(chunk["number"])
        if line is None:
            continue
        at = window.at(line["time_s"])
        delay_ms = 1e3 * (chunk["finished_s"] - line["observed_s"])
        axes.bar(at, delay_ms, width=1.5 / window.rate_hz, color=LATE if chunk["late"] else EXECUTED)
        if chunk["prefix_length"]:
            covered = chunk["prefix_length"] * period_ms
            axes.plot([at - period_ms / 1e3, at + period_ms / 1e3], [covered] * 2, color=PREFIX, linewidth=2.5)
    axes.set_ylabel("delay (ms)")
    axes.set_title("from observation to chunk (bar); covered by its prefix (line)", loc="left")


def _plot_lateness(axes: Axes, window: _Window) -> None:
    steps = window.lines["step"]
    late_ms = [1e3 * (line["time_s"] - line["step"] / window.rate_hz) for line in steps]
    axes.plot([window.at_step(line["step"]) for line in steps], late_ms, ".", color="0.3", markersize=3)
    for line in window.lines["missed"]:
        left, right = (window.at_step(line["first"] + offset) for offset in (0, line["count"]))
        axes.axvspan(left, right, color=LATE, alpha=0.4, linewidth=0)
    axes.set_ylim(0, 1.1 * max([*late_ms, 1.0]))
    axes.set_ylabel("late (ms)")
    axes.set_title("commands after they were due; red: steps without one", loc="left")


def _shade_held(axes: Axes, window: _Window) -> None:
    for first, length in _runs([line["step"] for line in window.lines["step"] if line["source"] == "hold"]):
        left, right = window.at_step(first), window.at_step(first + length)
        axes.axvspan(left, right, color=HELD, alpha=0.25, linewidth=0)


def _runs(steps: list[int]) -> list[tuple[int, int]]:
    """Neighbouring steps as one: (first, length)."""
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and step == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((step, 1))
    return runs
