"""A run as one page of HTML that loads nothing but its own videos: how good, how sure, beside whom; `DIR/page.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from xr0_engine.bench.tell.page import STYLE as PAGE_STYLE
from xr0_engine.bench.tell.page import definitions, document, figure, folded, table
from xr0_engine.evaluation import charts
from xr0_engine.evaluation.beside import beside
from xr0_engine.evaluation.charts import Bar, Point
from xr0_engine.evaluation.page_failures import failure_section
from xr0_engine.evaluation.page_published import published_section, suite_strips
from xr0_engine.evaluation.published import OURS, benchmark_title
from xr0_engine.evaluation.rates import (
    Condition,
    TaskRate,
    against,
    conditions,
    is_expert,
    per_cent,
    policy_title,
    uneven,
)
from xr0_engine.evaluation.results import Results, read_results
from xr0_engine.evaluation.tables import plain, told_headline, told_ms, told_number, told_seconds, told_value
from xr0_engine.whole import write_whole

PAGE_FILE = "page.html"
MOST_TASKS = 40
"""Shown unfolded."""
EXPERT = (
    "A scripted expert: it looks into the simulator, and shows what can be reached. It is no policy, and what others "
    "published says nothing about it."
)


def write_page(folder: Path) -> Path:
    """The page of a results folder, beside its results; videos are referred to by their relative files.

    Raises ValueError as read_results, OSError.
    """
    out = folder / PAGE_FILE
    write_whole(out, page(read_results(folder)))
    return out


def page(results: Results) -> str:
    """The HTML."""
    found = conditions(results)
    name = f"{policy_title(results.run)} on {benchmark_title(results.run.benchmark)}"
    if found:
        parts = [
            _first(results, found),
            _delays(found) if len(found) > 1 else "",
            published_section(results, found[0]),
            _tasks(found[0]) if len(found[0].tasks) > 1 else "",
            failure_section(results),
        ]
    else:
        note = '<p class="note">The run has just begun, or its first trials did not come to an end.</p>'
        parts = [f"<section><h2>No episode has ended yet</h2>{note}</section>"]
    header = f"<h1>{escape(name)}</h1><p>{escape(_where(results))}</p>"
    main = "\n".join(part for part in (*parts, _details(results)) if part)
    return document(name, header, main, PAGE_STYLE + charts.STYLE, videos=True)


def _where(results: Results) -> str:
    run = results.run
    what = (run.policy.get(name) for name in ("kind", "dtype", "backend"))
    count = len(results.episodes)
    parts = [*(str(part) for part in what if part), f"{count} episode{'' if count == 1 else 's'}", run.created[:10]]
    return " · ".join(parts)


def _first(results: Results, found: Sequence[Condition]) -> str:
    """The figure to see first, how sure it is, and the suites that it is made of."""
    first = found[0]
    headline = first.headline
    unit = {"%": "%", "tasks in a row": "tasks in a row", "pieces/min": "pieces a minute"}[headline.unit]
    low, high = (told_number(bound, headline.unit) for bound in (headline.value.low, headline.value.high))
    count = f"{first.trials} trial{'s' if first.trials != 1 else ''} of {len(first.tasks)} task"
    count += "s" if len(first.tasks) != 1 else ""
    what = f"mean of {len(first.suites)} suites, " if len(first.suites) > 1 else f"suite {next(iter(first.suites))}, "
    parts = [
        "<section>",
        f'<div class="hero"><strong>{told_number(headline.value.value, headline.unit)} <small>{unit}</small></strong>',
        f'<div><p class="sure">95 % interval {low} to {high}</p>',
        f"<p>{escape(f'{what}{count}; mode {first.label}')}</p>",
        f"<p>{escape(_against(results, first))}</p></div></div>",
        *(f'<p class="warning">{escape(line)}</p>' for line in _warnings(results, found)),
        suite_strips(results, first),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _against(results: Results, condition: Condition) -> str:
    """Where the published figure of the same model lies."""
    if is_expert(results.run):
        return ""
    for shown in beside(results.run, condition):
        for figure_, values in shown.rows:
            ours = shown.ours[-1]
            if figure_.policy.startswith(OURS) and values[-1] is not None and ours is not None:
                place = "below" if values[-1] < ours.low else "above" if values[-1] > ours.high else "within"
                told = told_value(values[-1], shown.unit)
                return f"{figure_.policy} as published: {told}, {place} the interval"
    return "nothing published to set beside it"


def _warnings(results: Results, found: Sequence[Condition]) -> list[str]:
    lines = []
    if is_expert(results.run):
        lines.append(EXPERT)
    if len(results.episodes) < results.planned:
        lines.append(f"Unfinished: {len(results.episodes)} of {results.planned} episodes.")
    errors = sum(episode.error is not None for episode in results.episodes)
    if errors:
        lines.append(f"{errors} of {len(results.episodes)} episodes ended in an error; they count as failures.")
    unequal = uneven(found)
    return [*lines, f"{unequal[0].upper()}{unequal[1:]}."] if unequal else lines


def _delays(found: Sequence[Condition]) -> str:
    """Success and reaction over the delay, a line for each mode."""
    headline = found[0].headline
    success: dict[str, list[Point]] = {}
    reaction: dict[str, list[Point]] = {}
    for condition in found:
        value, x = condition.headline.value, condition.delay_steps
        tip = f"{condition.label}: {told_headline(condition)}, {condition.trials} trials"
        success.setdefault(condition.mode, []).append(Point(x, value.value, value.low, value.high, tip))
        middle, late = condition.reaction_ms["p50"], condition.reaction_ms["p99"]
        if middle is not None and late is not None:
            tip = f"{condition.label}: {told_ms(middle)} ms p50, {told_ms(late)} ms p99"
            reaction.setdefault(condition.mode, []).append(Point(x, middle, middle, max(middle, late), tip))
    step = next((c.delay_ms / c.delay_steps for c in found if c.delay_ms and c.delay_steps), None)
    x_name = "delay, control steps" + (f" of {step:.0f} ms" if step else "")
    names = {"%": "success, %", "tasks in a row": "tasks in a row", "pieces/min": "pieces a minute"}
    what = "How often it succeeds" if headline.unit == "%" else names[headline.unit].capitalize()
    chart = charts.lines(success, x_name, names[headline.unit], "Success over delay", headline.most)
    drawn = [figure(f"{what}, with 95 % intervals", chart, success)]
    if reaction:
        chart = charts.lines(reaction, x_name, "ms", "Reaction over delay")
        drawn.append(figure("Reaction: how old the look behind an action is, p50 to p99", chart, reaction))
    took: dict[str, list[Point]] = {}
    for condition in found:
        if condition.success_s is not None and headline.unit == "%":
            tip = f"{condition.label}: {condition.success_s:.1f} s on average"
            took.setdefault(condition.mode, []).append(
                Point(condition.delay_steps, condition.success_s, condition.success_s, condition.success_s, tip)
            )
    if took:
        chart = charts.lines(took, x_name, "s", "Duration over delay")
        drawn.append(figure("How long a success takes, on average", chart, took))
    rows = [
        [
            condition.label,
            told_number(condition.headline.value.value, headline.unit),
            f"{told_number(condition.headline.value.low, headline.unit)} to "
            f"{told_number(condition.headline.value.high, headline.unit)}",
            str(condition.trials),
            told_seconds(condition.success_s),
            told_ms(condition.reaction_ms["p50"]),
            told_ms(condition.reaction_ms["p99"]),
            _paired(found[0], condition),
        ]
        for condition in found
    ]
    head = ["", names[headline.unit], "95 % interval", "trials", "a success took, s", "reaction p50, ms", "p99, ms"]
    head.append(f"against {found[0].label}, trial by trial")
    note = (
        "The world moves on while the policy thinks. sync: the robot waits for the next chunk. naive: it goes on with "
        "the last one, then changes over. async: as naive, but each chunk is made to go on from what is done "
        "meanwhile; guided: the same for a policy that was trained without, by the flow's gradient."
    )
    return (
        f'<section><h2>Under inference delay</h2><p class="note">{note}</p><div class="pair">{"".join(drawn)}</div>'
        f"{folded('The same as a table', table(head, rows))}</section>"
    )


def _paired(first: Condition, other: Condition) -> str:
    found = against(first, other)
    return (
        ""
        if found is None
        else f"{100 * found.difference.value:+.1f} % (+{found.gained}, −{found.lost}; p {found.p:.2g})"
    )


def _tasks(condition: Condition) -> str:
    def drawn(tasks: Sequence[TaskRate]) -> str:
        rows = []
        for task in tasks:
            found = per_cent(task.rate.interval)
            told = f"{task.rate.successes}/{task.rate.trials}"
            tip = f"{task.name}: {told}, {found.value:.0f} %, 95 % interval {found.low:.0f} to {found.high:.0f}"
            surely = f"{found.low:.0f}–{found.high:.0f} %"
            label = f"{task.index}  {plain(task.name)}"
            group = task.suite if len(condition.suites) > 1 else ""
            rows.append(Bar(label, found.value, told, found, "task", surely, tip, group))
        return charts.bars(rows, 100)

    heading = f"<h2>Task by task</h2><p class='note'>{escape(f'mode {condition.label}')}</p>"
    if len(condition.tasks) <= MOST_TASKS:
        return f"<section>{heading}{drawn(condition.tasks)}</section>"
    failing = [task for task in condition.tasks if task.rate.successes < task.rate.trials]
    solved = [task for task in condition.tasks if task.rate.successes == task.rate.trials]
    rest = folded(f"{len(solved)} tasks without a failure", drawn(solved)) if solved else ""
    return f"<section>{heading}{drawn(failing)}{rest}</section>"


def _details(results: Results) -> str:
    run = results.run
    groups: Mapping[str, Mapping[str, Any]] = {
        "protocol": run.protocol,
        "execution": run.execution,
        "policy": run.policy,
        "simulator": run.versions,
        "code": run.code,
        "machine": run.machine,
        "run": {"created": run.created, "episodes": len(results.episodes), "planned": results.planned},
    }
    blocks = [
        definitions(title, [(str(name), _told(value)) for name, value in group.items()])
        for title, group in groups.items()
        if group
    ]
    return f'<section><h2>How it was measured</h2><div class="details">{"".join(blocks)}</div></section>'


def _told(value: Any) -> str:
    return value if isinstance(value, str) else "–" if value is None else json.dumps(value, ensure_ascii=False)
