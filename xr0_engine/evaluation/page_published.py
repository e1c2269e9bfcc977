"""The page's part of published figures: marks on a run's bars, every policy in its place, and the sources."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from xr0_engine.bench.tell.page import folded, table
from xr0_engine.evaluation import charts
from xr0_engine.evaluation.beside import Beside, beside
from xr0_engine.evaluation.charts import Bar, Strip
from xr0_engine.evaluation.published import OURS
from xr0_engine.evaluation.rates import Condition
from xr0_engine.evaluation.results import Results
from xr0_engine.evaluation.tables import told_number


def suite_strips(results: Results, condition: Condition) -> str:
    """For every column that papers have, the run's rate and its interval among what they have there."""
    blocks = []
    for shown in beside(results.run, condition):
        last = len(shown.columns) - 1
        places = [place for place in range(last + 1) if place < last or shown.unit == "%"]
        rows = [strip for place in places if (strip := _strip(shown, place)) is not None]
        if not rows:
            continue
        keys = [("ours", "this run"), ("span", "95 % interval")]
        if shown.rows:
            keys += [("named", f"{OURS}, published"), ("other", "others, published")]
        drawn = charts.strips(rows, _beginning(rows), 100)
        blocks.append(f"<h3>{escape(_heading(shown))}</h3>{charts.legend(keys)}{drawn}")
    return "".join(blocks)


def _heading(shown: Beside) -> str:
    if shown.unit == "tasks in a row":
        return f"{shown.title}: chains that solved so many tasks in a row, %"
    return "Success by suite, %" if shown.title == "suites" else f"Success on {shown.title}, %"


def _strip(shown: Beside, place: int) -> Strip | None:
    ours = shown.ours[place]
    if ours is None:
        return None
    others = []
    # Drawn last is seen best.
    for figure, values in reversed(shown.rows):
        value = values[place]
        if value is not None:
            kind = "named" if figure.policy.startswith(OURS) else "other"
            others.append((value, kind, f"{figure.policy}, published: {value:g} %"))
    label = shown.columns[place]
    return Strip(label, ours, f"{ours.value:.1f}", f"{ours.low:.1f}–{ours.high:.1f}", tuple(others))


def _beginning(rows: Sequence[Strip]) -> float:
    """Of a scale that shows the run's intervals and the same model's published rates at a glance."""
    named = [value for row in rows for value, kind, _ in row.others if kind == "named"]
    lowest = min([row.value.low for row in rows] + named)
    return max(0.0, 20 * ((lowest - 5) // 20))


def published_section(results: Results, condition: Condition) -> str:
    """Every published policy with its place, and a table of all figures and their sources."""
    blocks = []
    for shown in beside(results.run, condition):
        if not shown.rows or shown.ours[-1] is None:
            continue
        blocks.append(_ranked(shown))
    if not blocks:
        return ""
    note = "Theirs are as published, from their own code, protocol and machine: set beside, not compared pair by pair."
    return f'<section><h2>Beside published policies</h2><p class="note">{note}</p>{"".join(blocks)}</section>'


def _ranked(shown: Beside) -> str:
    ours, unit = shown.ours[-1], shown.unit
    assert ours is not None
    bars = [
        Bar(
            "this run",
            ours.value,
            told_number(ours.value, unit),
            ours,
            "ours",
            f"{told_number(ours.low, unit)}–{told_number(ours.high, unit)}",
        )
    ]
    for figure, values in shown.rows:
        if (value := values[-1]) is not None:
            kind = "named" if figure.policy.startswith(OURS) else "other"
            tip = f"{figure.source.title}: {figure.source.place}; {figure.source.protocol}"
            bars.append(Bar(figure.policy, value, told_number(value, unit), None, kind, tip=tip))
    bars.sort(key=lambda bar: -bar.value)
    most = 100.0 if unit == "%" else 5.0 if unit == "tasks in a row" else 1.15 * max(bar.value for bar in bars)
    names = {"%": "success, %", "tasks in a row": "tasks in a row, of 5", "pieces/min": "pieces a minute"}
    of = f"mean of {len(shown.columns) - 1} suites" if shown.title == "suites" else shown.title
    heading = f"<h3>{escape(f'{of}: {names[unit]}')}</h3>"
    everything = _all_figures(shown)
    return f"{heading}{charts.bars(bars, most, slim=True)}{folded('All figures, and their sources', everything)}"


def _all_figures(shown: Beside) -> str:
    units = ["%"] * (len(shown.columns) - 1) + [shown.unit]

    def cells(values: Sequence[float | None]) -> list[str]:
        each = zip(values, units, strict=True)
        return ["–" if value is None else f"{value:.2f}" if unit != "%" else f"{value:.1f}" for value, unit in each]

    ours = cells([None if value is None else value.value for value in shown.ours])
    rows = [["this run", *ours, ""]]
    sources = []
    for figure, values in shown.rows:
        source = figure.source
        if source not in sources:
            sources.append(source)
        rows.append([figure.policy, *cells(values), str(sources.index(source) + 1)])
    listed = "".join(
        f'<li>{escape(source.title)} ({source.year}), <a href="{escape(source.url)}">{escape(source.url)}</a>: '
        f"{escape(source.place)}. {escape(source.protocol)}.</li>"
        for source in sources
    )
    return f'{table(["", *shown.columns, "source"], rows)}<ol class="next">{listed}</ol>'
