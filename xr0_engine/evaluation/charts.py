"""Charts of rates: bars as wide as the page gives them, and lines over the delay; SVG within HTML, every text escaped.

Bars are rows of a table, so that a phone shows them as well as a screen, and that they can be read without seeing them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from xr0_engine.bench.tell.charts import Axis
from xr0_engine.evaluation.intervals import Interval

WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 444, 26, 236
FONT = 13

STYLE = """
.hero { display: flex; flex-wrap: wrap; gap: 8px 40px; align-items: flex-end; }
.hero strong { font-size: 58px; line-height: 1; letter-spacing: -0.03em; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.hero strong small { font-size: 24px; letter-spacing: 0; font-weight: 500; }
.hero p { margin: 0; }
.hero .sure { font-size: 17px; font-weight: 600; }
.legend.bar-legend { margin: 6px 0 4px; color: var(--soft); }
.legend.bar-legend i { display: inline-block; width: 22px; margin-right: 6px; vertical-align: -2px; }
.bar-legend svg.bar { height: 12px; }
table.rates { width: 100%; table-layout: fixed; font-size: 14px; }
table.rates th, table.rates td { border: 0; padding: 3px 0; white-space: normal; vertical-align: middle; }
table.rates th[scope="row"] { padding-right: 14px; overflow-wrap: anywhere; line-height: 1.3; }
table.rates col.name { width: 34%; } table.rates col.value { width: 118px; }
table.rates td.value { text-align: right; white-space: nowrap; }
table.rates td.value small { color: var(--soft); font-size: 12px; display: block; line-height: 1.2; }
table.rates.slim col.name { width: 230px; } table.rates.slim col.value { width: 92px; }
table.rates tr.ours th, table.rates tr.ours td.value { font-weight: 600; }
table.rates tr.ours td.value small { font-weight: 400; }
table.rates th[scope="rowgroup"] { color: var(--soft); font-size: 13px; font-weight: 600; padding-top: 14px; }
svg.bar { height: 20px; overflow: visible; } table.slim svg.bar { height: 14px; }
svg.bar .track { fill: var(--line); fill-opacity: 0.5; }
svg.bar .fill { fill: var(--c5); fill-opacity: 0.55; }
tr.ours svg.bar .fill, tr.task svg.bar .fill { fill: var(--c0); fill-opacity: 1; }
tr.named svg.bar .fill { fill: var(--c1); fill-opacity: 0.75; }
svg.bar path { vector-effect: non-scaling-stroke; fill: none; }
svg.bar .sure { stroke: var(--ink); stroke-width: 1.6; }
svg.bar .span { fill: var(--c0); fill-opacity: 0.3; }
svg.bar .ours { stroke: var(--c0); stroke-width: 5; }
svg.bar .named { stroke: var(--c1); stroke-width: 4; }
svg.bar .other { stroke: var(--c5); stroke-width: 1.5; }
table.rates tr.scale td { color: var(--soft); font-size: 12px; padding-top: 0; }
tr.scale div { display: flex; justify-content: space-between; }
svg.lines { min-width: 0; } svg.lines .band { fill: var(--c); fill-opacity: 0.14; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 18px 16px;
  margin-top: 12px; }
.videos figure { margin: 0; }
.videos figcaption { font-weight: 400; font-size: 13px; line-height: 1.4; margin: 6px 0 0; }
.videos figcaption b { display: block; overflow-wrap: anywhere; }
video { width: 100%; display: block; border-radius: 6px; background: #000; aspect-ratio: 1; object-fit: contain; }
table.wide td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; min-width: 70px; }
h2 + .note { margin-bottom: 6px; }
@media (max-width: 560px) {
  header, main { padding: 0 12px; } header { padding-top: 22px; } section { padding: 18px 14px; margin: 14px 0; }
  .hero strong { font-size: 46px; }
  table.rates { font-size: 13px; } table.rates col.name { width: 46%; } table.rates.slim col.name { width: 36%; }
  table.rates col.value, table.rates.slim col.value { width: 76px; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One row of `bars`. told: its value in words. surely: its interval; None for what others published. kind: `ours`,
    `task` (of this run too), `named` (of the same model) or `other`. told_surely: the interval in words. tip: what
    hovering shows. group: the heading that it comes under, if any."""

    label: str
    value: float
    told: str
    surely: Interval | None
    kind: str
    told_surely: str = ""
    tip: str = ""
    group: str = ""


@dataclass(frozen=True)
class Strip:
    """One row of `strips`: a value with its interval, both in words too, and what others have here: (value, `named` or
    `other`, tip) of each."""

    label: str
    value: Interval
    told: str
    told_surely: str
    others: tuple[tuple[float, str, str], ...]


@dataclass(frozen=True)
class Point:
    """One of `lines`: x, y, the band around y, and what hovering shows."""

    x: float
    y: float
    low: float
    high: float
    tip: str


def bars(rows: Sequence[Bar], most: float, slim: bool = False) -> str:
    """A table of bars from 0 to most."""
    body, group = [], ""
    for row in rows:
        if row.group and row.group != group:
            group = row.group
            body.append(f'<tr><th scope="rowgroup" colspan="3">{escape(group)}</th></tr>')
        small = f"<small>{escape(row.told_surely)}</small>" if row.told_surely else ""
        body.append(
            f'<tr class="{row.kind}"><th scope="row">{escape(row.label)}</th><td>{_bar(row, most)}</td>'
            f'<td class="value">{escape(row.told)}{small}</td></tr>'
        )
    columns = '<col class="name"><col><col class="value">'
    kind = "rates slim" if slim else "rates"
    return f'<table class="{kind}"><colgroup>{columns}</colgroup><tbody>{"".join(body)}</tbody></table>'


def strips(rows: Sequence[Strip], low: float, high: float) -> str:
    """A table of values with their intervals between marks of what others have, on a scale from low to high: as there
    are no bars, it need not begin at 0. Marks off the scale are left out."""

    def x(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 3)

    body = []
    for row in rows:
        start, end = x(row.value.low), x(row.value.high)
        marks = ['<rect class="track" width="100" height="10"/>']
        marks.append(f'<rect class="span" x="{start}" width="{end - start:.3f}" height="10"/>')
        for value, kind, tip in row.others:
            if low <= value <= high:
                marks.append(f'<path class="{kind}" d="M{x(value)},0V10" data-tip="{escape(tip)}"/>')
        tip = escape(f"{row.label}: {row.told}, 95 % interval {row.told_surely}")
        marks.append(f'<path class="ours" d="M{x(row.value.value)},0V10" data-tip="{tip}"/>')
        body.append(
            f'<tr class="ours"><th scope="row">{escape(row.label)}</th><td>{_picture(marks)}</td>'
            f'<td class="value">{escape(row.told)}<small>{escape(row.told_surely)}</small></td></tr>'
        )
    ticks = "".join(f"<span>{low + (high - low) * step / 4:g}</span>" for step in range(5))
    body.append(f'<tr class="scale"><td></td><td><div>{ticks}</div></td><td></td></tr>')
    columns = '<col class="name"><col><col class="value">'
    return f'<table class="rates slim"><colgroup>{columns}</colgroup><tbody>{"".join(body)}</tbody></table>'


def legend(keys: Sequence[tuple[str, str]]) -> str:
    """What the marks of strips mean: (class of the mark, words)."""
    each = []
    for kind, words in keys:
        mark = 'rect width="22" height="10"' if kind == "span" else 'path d="M11,0V10"'
        drawn = _picture([f'<{mark} class="{kind}"/>'], 22)
        each.append(f"<span><i>{drawn}</i>{escape(words)}</span>")
    return f'<p class="legend bar-legend">{"".join(each)}</p>'


def _bar(row: Bar, most: float) -> str:
    def x(value: float) -> float:
        return round(100 * min(max(value / most, 0.0), 1.0), 3)

    marks = ['<rect class="track" width="100" height="10"/>']
    marks.append(f'<rect class="fill" width="{x(row.value)}" height="10"/>')
    if row.surely is not None:
        low, high = x(row.surely.low), x(row.surely.high)
        marks.append(f'<path class="sure" d="M{low},5H{high}M{low},2.5V7.5M{high},2.5V7.5"/>')
    return _picture(marks, tip=row.tip)


def _picture(marks: Sequence[str], width: int = 100, tip: str = "") -> str:
    told = f' data-tip="{escape(tip)}"' if tip else ""
    box = f'viewBox="0 0 {width} 10" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="bar" {box}{told}>{"".join(marks)}</svg>'


def lines(
    series: Mapping[str, Sequence[Point]], x_name: str, y_name: str, title: str, most: float | None = None
) -> str:
    """A line and its band for each name, y from 0 to most, or as far as the bands go."""
    points = [point for line in series.values() for point in line]
    xs = sorted({point.x for point in points})
    spread = (xs[-1] - xs[0]) or 1.0
    x = Axis(xs[0] - 0.06 * spread, xs[-1] + 0.06 * spread, LEFT, RIGHT)
    y = Axis(0, most if most is not None else 1.06 * max(max(point.high for point in points), 1e-9), BOTTOM, TOP)
    marks = []
    for tick in y.ticks(5):
        marks.append(f'<path class="grid" d="M{LEFT},{y(tick)}H{RIGHT}"/>')
        marks.append(_text(LEFT - 6, y(tick) + 4, f"{tick:,.6g}", "end"))
    marks.append(_text(0, TOP - 12, y_name, "start"))
    last = -1e9
    for value in xs:
        # Labels that would touch are left out; the points tell on hovering.
        if x(value) - last >= 26:
            last = x(value)
            marks.append(_text(last, BOTTOM + 18, f"{value:g}", "middle"))
    marks.append(_text((LEFT + RIGHT) / 2, BOTTOM + 38, x_name, "middle"))
    for number, line in enumerate(series.values()):
        upper = [f"{x(point.x)},{y(point.high)}" for point in line]
        lower = [f"{x(point.x)},{y(point.low)}" for point in reversed(line)]
        marks.append(f'<path class="band s{number}" d="M{"L".join([*upper, *lower])}Z"/>')
    for number, line in enumerate(series.values()):
        middle = "L".join(f"{x(point.x)},{y(point.y)}" for point in line)
        marks.append(f'<path class="line s{number}" d="M{middle}"/>')
        for point in line:
            place = f'cx="{x(point.x)}" cy="{y(point.y)}" r="5"'
            marks.append(f'<circle class="dot s{number}" {place} data-tip="{escape(point.tip)}"/>')
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="lines" {box} font-size="{FONT}">{"".join(marks)}</svg>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
