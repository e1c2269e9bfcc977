"""Charts as inline SVG: no library, no external file, colours from the page's style, every text escaped.

A mark with a `data-tip` shows it on hover (report.py holds the script). Series keep their colour, class s0, s1, ...,
in every chart of a page; lines differ in their dashes too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

import numpy as np

WIDE, HALF = 1040, 500
"""Widths at which the page shows them in about their own size: across, or two side by side."""
FONT = 12
LETTER = 6.6
"""Width of a letter at FONT, on the generous side: what is measured is only how much room a label needs."""
FEWEST_BINS, MOST_BINS = 12, 48
MOST_POINTS = 360
"""More points than this in one line are not to be told apart."""

Samples = Mapping[str, Sequence[float]]
"""Series -> milliseconds."""


@dataclass(frozen=True)
class Bar:
    """One line of `bars`. low and high: quartiles. tip: what hovering shows."""

    label: str
    middle: float
    low: float
    high: float
    series: int
    tip: str


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to the picture."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, wanted: int = 6) -> list[float]:
        """Round values, about as many as wanted."""
        rough = (self.high - self.low) / wanted
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(number * step, 12) for number in range(first, last + 1)]


def milliseconds(value: float) -> str:
    """Three significant digits, never an exponent: 0.0123, 4.56, 789, 12,300."""
    if value == 0:
        return "0"
    exponent = int(f"{value:.2e}".partition("e")[2])
    return f"{value:,.{max(0, 2 - exponent)}f}"


def timeline(
    series: Mapping[str, Mapping[str, float]], bound: Mapping[str, float], title: str, in_turn: bool = True
) -> str:
    """A bar for every stage, with its bound inside.

    series: name -> stage -> median milliseconds. bound: stage -> milliseconds, for the stages that have one.
    in_turn: each stage starts where the one before it ended; else all start at 0.
    """
    stages = list(dict.fromkeys(stage for times in series.values() for stage in times if stage != "total"))
    if any("total" in times for times in series.values()):
        stages.append("total")
    join = sum if in_turn else max
    ends = [join(v for s, v in times.items() if s != "total" or len(times) == 1) for times in series.values()]
    high = max(*ends, *(times.get("total", 0) for times in series.values())) or 1.0
    left, bar, gap, top = _label_room(stages), 16, 12, 8
    x = Axis(0, high, left, WIDE - 74)
    y = float(top)
    marks = []
    starts = dict.fromkeys(series, 0.0)
    bottom = top + len(stages) * (len(series) * bar + gap)
    grid = _x_axis(x, top, bottom, "ms")
    for stage in stages:
        middle = y + len(series) * bar / 2
        marks.append(_text(left - 8, middle + 4, stage, "end", "strong" if stage == "total" else ""))
        for number, (name, times) in enumerate(series.items()):
            if stage in times:
                start = 0.0 if stage == "total" else starts[name]
                value, least = times[stage], bound.get(stage)
                starts[name] = start + value if in_turn else 0.0
                share = f"; {least / value:.0%} of the bound, {milliseconds(least)} ms" if least and value else ""
                tip = f"{name}, {stage}: {milliseconds(value)} ms{share}"
                width = x(start + value) - x(start)
                marks.append(_rect(x(start), y, width, bar - 3, f"s{number}", tip))
                if least:
                    inner = min(least, value)
                    marks.append(_rect(x(start), y + 4, x(start + inner) - x(start), bar - 11, "bound", tip))
                marks.append(_text(x(start + value) + 5, y + bar - 5, milliseconds(value), "start", "value"))
            y += bar
        y += gap
    return _svg(WIDE, bottom + 36, title, [*grid, *marks])


def histogram(samples: Samples, deadlines: Mapping[str, float], title: str) -> str:
    """How many rounds took how long. deadlines: label -> milliseconds; those on the axis are drawn."""
    x, beyond = _time_axis(samples, 52, HALF - 16)
    longest = max(len(values) for values in samples.values())
    bins = min(max(round(2 * longest**0.5), FEWEST_BINS), MOST_BINS)
    edges = np.linspace(x.low, x.high, bins + 1)
    counts = {name: np.histogram(np.asarray(values), edges)[0] for name, values in samples.items()}
    top, bottom = 36, 264
    y = Axis(0, max(1, *(int(found.max()) for found in counts.values())), bottom, top)
    marks = [*_x_axis(x, top, bottom, "ms"), *_y_axis(y, 52, HALF - 16, "rounds", whole=True)]
    for number, found in enumerate(counts.values()):
        outline = [f"M{x(edges[0])},{bottom}"]
        for index, count in enumerate(found):
            outline.append(f"V{y(count)}H{x(edges[index + 1])}")
        marks.append(f'<path class="area s{number}" d="{"".join(outline)}V{bottom}Z"/>')
    marks += _deadlines(x, top, bottom, deadlines)
    for index in range(bins):
        if any(found[index] for found in counts.values()):
            told = "; ".join(f"{name}: {found[index]}" for name, found in counts.items())
            tip = f"{milliseconds(edges[index])} to {milliseconds(edges[index + 1])} ms: rounds of {told}"
            marks.append(_hover(x(edges[index]), top, x(edges[index + 1]) - x(edges[index]), bottom - top, tip))
    return _svg(HALF, bottom + 36, title, [*marks, *_beyond(beyond, top)])


def distribution(samples: Samples, deadlines: Mapping[str, float], title: str) -> str:
    """Share of rounds that were done by a time: the cumulative distribution."""
    x, beyond = _time_axis(samples, 56, HALF - 16)
    top, bottom = 36, 264
    y = Axis(0, 100, bottom, top)
    marks = [*_x_axis(x, top, bottom, "ms"), *_y_axis(y, 56, HALF - 16, "% done")]
    ordered = {name: np.sort(np.asarray(values, np.float64)) for name, values in samples.items()}
    for number, values in enumerate(ordered.values()):
        picked = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).astype(int))
        steps = [f"M{x(x.low)},{bottom}"]
        for index in picked[values[picked] <= x.high]:
            steps.append(f"H{x(values[index])}V{y(100 * (index + 1) / len(values))}")
        marks.append(f'<path class="line s{number}" d="{"".join(steps)}H{x.end}"/>')
    marks += _deadlines(x, top, bottom, deadlines)
    edges = np.linspace(x.low, x.high, MOST_BINS + 1)
    for low, high in pairwise(edges):
        told = "; ".join(f"{name}: {np.mean(values <= high):.1%}" for name, values in ordered.items())
        marks.append(_hover(x(low), top, x(high) - x(low), bottom - top, f"done by {milliseconds(high)} ms: {told}"))
    return _svg(HALF, bottom + 36, title, [*marks, *_beyond(beyond, top)])


def rounds(samples: Samples, deadlines: Mapping[str, float], title: str) -> str:
    """Every round in the order it ran: drift and outliers. Long runs: the slowest of each group of neighbours."""
    longest = max(len(values) for values in samples.values())
    group = math.ceil(longest / MOST_POINTS)
    unit = "round" if group == 1 else f"round; the slowest of every {group} is drawn"
    radius = 2 if longest > MOST_POINTS / 4 else 3.5
    high = max(max(values) for values in samples.values()) or 1.0
    top, bottom = 28, 208
    left = _label_room([milliseconds(high)])
    right = WIDE - 84
    x, y = Axis(0.5, longest + 0.5, left, right), Axis(0, 1.05 * high, bottom, top)
    marks = [*_x_axis(x, top, bottom, unit), *_y_axis(y, left, right, "ms")]
    for name, limit in deadlines.items():
        if limit < y.high:
            marks.append(f'<path class="deadline" d="M{left},{y(limit)}H{right}"/>')
            marks.append(_text(right + 6, y(limit) + 4, name, "start"))
    for number, (name, values) in enumerate(samples.items()):
        for start in range(0, len(values), group):
            slowest = start + int(np.argmax(values[start : start + group]))
            tip = escape(f"{name}, round {slowest + 1}: {milliseconds(values[slowest])} ms")
            place = f'cx="{x(slowest + 1)}" cy="{y(values[slowest])}"'
            marks.append(f'<circle class="dot s{number}" {place} r="{radius}" data-tip="{tip}"/>')
    return _svg(WIDE, bottom + 36, title, marks)


def bars(rows: Sequence[Bar], unit: str, title: str, reference: float = 1.0) -> str:
    """Ratios around a reference line, each with its quartiles."""
    bar, top = 24, 8
    left = _label_room([row.label for row in rows])
    ends = [reference, *(value for row in rows for value in (row.low, row.middle, row.high))]
    margin = 0.06 * (max(ends) - min(ends)) or 0.1
    x = Axis(min(ends) - margin, max(ends) + margin, left, WIDE - 60)
    bottom = top + bar * len(rows)
    marks = _x_axis(x, top, bottom, unit)
    for number, row in enumerate(rows):
        y = top + bar * number
        start, end = sorted((x(reference), x(row.middle)))
        marks.append(_text(left - 8, y + bar / 2 + 4, row.label, "end"))
        marks.append(_rect(start, y + 5, max(end - start, 1), bar - 10, f"s{row.series}", row.tip))
        low, high, middle = x(row.low), x(row.high), y + bar / 2
        marks.append(f'<path class="whisker" d="M{low},{middle - 4}v8m0,-4H{high}m0,-4v8"/>')
        marks.append(_text(max(high, end) + 6, middle + 4, f"{row.middle:.2f}", "start", "value"))
        marks.append(_hover(left, y, WIDE - left, bar, row.tip))
    marks.append(f'<path class="reference" d="M{x(reference)},{top}V{bottom}"/>')
    return _svg(WIDE, bottom + 36, title, marks)


def curve(points: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str, title: str) -> str:
    """Lines through (x, y) points, y from 0; one tick for every x that was measured."""
    xs = sorted({x for line in points.values() for x, _ in line})
    high = max(y for line in points.values() for _, y in line)
    top, bottom, left = 24, 254, 72
    # Batches double: equal steps on the axis.
    place = Axis(0, max(1, len(xs) - 1), left + 24, HALF - 40)
    y = Axis(0, 1.08 * high, bottom, top)
    marks = _y_axis(y, left, HALF - 16, y_name)
    for number, value in enumerate(xs):
        marks.append(_text(place(number), bottom + 16, f"{value:g}", "middle"))
    marks.append(_text((left + HALF - 16) / 2, bottom + 32, x_name, "middle"))
    for number, (name, line) in enumerate(points.items()):
        at = [(place(xs.index(x)), y(value)) for x, value in line]
        marks.append(f'<path class="line s{number}" d="M{"L".join(f"{a},{b}" for a, b in at)}"/>')
        for (a, b), (x_value, value) in zip(at, line, strict=True):
            tip = escape(f"{name}, {x_name} {x_value:g}: {milliseconds(value)} {y_name}")
            marks.append(f'<circle class="dot s{number}" cx="{a}" cy="{b}" r="4.5" data-tip="{tip}"/>')
            marks.append(_text(a, b - 10, milliseconds(value), "middle", "value"))
    return _svg(HALF, bottom + 42, title, marks)


def _time_axis(samples: Samples, start: float, end: float) -> tuple[Axis, list[str]]:
    """An axis for all samples but far outliers, and what is said of those."""
    every = np.concatenate([np.asarray(values, np.float64) for values in samples.values()])
    widest = 3 * max(float(np.percentile(values, 90)) for values in samples.values())
    high, low = min(float(every.max()), widest), float(every.min())
    margin = 0.04 * (high - low) or 0.05 * high or 1.0
    beyond = every[every > high + margin]
    told = [f"{len(beyond)} rounds further right, up to {milliseconds(float(beyond.max()))} ms"] if len(beyond) else []
    return Axis(max(0.0, low - margin), high + margin, start, end), told


def _beyond(told: list[str], top: float) -> list[str]:
    return [_text(HALF - 18, top + 18, text, "end") for text in told]


def _deadlines(x: Axis, top: float, bottom: float, deadlines: Mapping[str, float]) -> list[str]:
    drawn, row, last = [], 0, -math.inf
    for name, limit in sorted(deadlines.items(), key=lambda item: item[1]):
        if x.low < limit < x.high:
            # Names that would touch go to a line of their own.
            row = row + 1 if x(limit) - last < LETTER * len(name) else 0
            last = x(limit)
            drawn.append(f'<path class="deadline" d="M{last},{top - 4 - FONT * row}V{bottom}"/>')
            half = LETTER * len(name) / 2
            drawn.append(_text(min(max(last, x.start + half), x.end - half), top - 8 - FONT * row, name, "middle"))
    return drawn


def _x_axis(x: Axis, top: float, bottom: float, unit: str) -> list[str]:
    ticks = x.ticks()
    lines = [f'<path class="grid" d="M{x(tick)},{top}V{bottom}"/>' for tick in ticks]
    labels = [_text(x(tick), bottom + 16, f"{tick:,.12g}", "middle") for tick in ticks]
    return [*lines, *labels, _text((x.start + x.end) / 2, bottom + 32, unit, "middle")]


def _y_axis(y: Axis, left: float, right: float, unit: str, whole: bool = False) -> list[str]:
    ticks = [tick for tick in y.ticks(5) if not whole or tick == int(tick)]
    lines = [f'<path class="grid" d="M{left},{y(tick)}H{right}"/>' for tick in ticks]
    labels = [_text(left - 6, y(tick) + 4, f"{tick:,.12g}", "end") for tick in ticks]
    return [*lines, *labels, _text(left - 6, y.end - 14, unit, "end")]


def _label_room(labels: Iterable[str]) -> float:
    return 14 + LETTER * max(len(label) for label in labels)


def _rect(x: float, y: float, width: float, height: float, kind: str, tip: str) -> str:
    size = f'x="{x}" y="{y}" width="{max(width, 0.5):.2f}" height="{height}"'
    return f'<rect class="{kind}" {size} rx="1.5" data-tip="{escape(tip)}"/>'


def _hover(x: float, y: float, width: float, height: float, tip: str) -> str:
    return f'<rect class="hover" x="{x}" y="{y}" width="{width:.2f}" height="{height}" data-tip="{escape(tip)}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: int, height: float, title: str, marks: Iterable[str]) -> str:
    box = f'class="w{width}" viewBox="0 0 {width} {height:g}" role="img" aria-label="{escape(title)}"'
    return f'<svg {box} font-size="{FONT}">{"".join(marks)}</svg>'
