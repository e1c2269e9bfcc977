"""What `xr0 eval` prints when a run ends, and the same as JSON: rates with intervals beside published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from xr0_engine.evaluation.beside import Beside, beside
from xr0_engine.evaluation.intervals import Interval
from xr0_engine.evaluation.published import Unit, benchmark_title
from xr0_engine.evaluation.rates import Condition, Rate, against, causes, conditions, per_cent, policy_title, uneven

if TYPE_CHECKING:
    from xr0_engine.evaluation.results import Results

MOST_TASKS = 40
"""With more tasks than this, those without a failure are only counted."""


def show_results(results: Results, console: Console | None = None) -> None:
    """Print a run's tables; of several modes and delays, the first one's rates and a line for each."""
    console = console or Console()
    console.print(f"[bold]{escape(title(results))}")
    found = conditions(results)
    if not found:
        console.print("no episode has ended yet: nothing to tell")
        return
    first = found[0]
    console.print(f"{first.label}: [bold]{escape(told_headline(first))}", highlight=False)
    for table in beside(results.run, first):
        console.print(_beside_table(table))
    if len(first.tasks) > 1:
        console.print(_task_table(first))
    if len(found) > 1:
        console.print(_delay_table(found))
    for line in remarks(results, found):
        console.print(escape(line), highlight=False)


def summary(results: Results) -> dict[str, Any]:
    """Everything that is told of a run, as JSON values; rates as shares of 1, times in the units of their names."""
    found = conditions(results)
    return {
        "benchmark": results.run.benchmark,
        "policy": dict(results.run.policy),
        "created": results.run.created,
        "episodes": len(results.episodes),
        "planned": results.planned,
        "conditions": [_condition(condition, found[0]) for condition in found],
        "failures": causes(results.episodes),
        "repeats": sum(episode.repeats for episode in results.episodes),
        "published": [_published(table) for table in (beside(results.run, found[0]) if found else ())],
        "remarks": remarks(results, found),
    }


def title(results: Results) -> str:
    """Benchmark, policy, and how much of it is done."""
    done, planned = len(results.episodes), results.planned
    count = f"{done}" if done == planned else f"{done} of {planned}"
    benchmark, policy = benchmark_title(results.run.benchmark), policy_title(results.run)
    return f"{benchmark}: {policy}, {count} episode{'' if planned == 1 else 's'}"


def told_headline(condition: Condition) -> str:
    """The one figure of a condition, and how sure it is."""
    headline = condition.headline
    told = told_value(headline.value.value, headline.unit)
    bounds = f"{told_number(headline.value.low, headline.unit)} to {told_number(headline.value.high, headline.unit)}"
    over = f", mean of {len(condition.suites)} suites" if headline.unit == "%" and len(condition.suites) > 1 else ""
    return f"{told}{over} (95 % interval {bounds})"


def told_value(value: float, unit: Unit) -> str:
    most = " of 5" if unit == "tasks in a row" else ""
    names = {"%": " %", "tasks in a row": f"{most} tasks in a row", "pieces/min": " pieces a minute"}
    return f"{told_number(value, unit)}{names[unit]}"


def told_number(value: float, unit: Unit) -> str:
    # As printed tables round: 96.85, which is a little less in binary, to 96.9.
    value += 1e-9
    return f"{value:.1f}" if unit == "%" else f"{value:.2f}"


def told_delay(condition: Condition) -> str:
    steps = f"{condition.delay_steps:g}"
    return steps if condition.delay_ms is None else f"{steps} ({condition.delay_ms:.0f} ms)"


def plain(name: str) -> str:
    """A simulator's name of a task, to be read."""
    return name.replace("_", " ")


def told_ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def told_repeats(count: int) -> str:
    trials = "1 repeat of a trial" if count == 1 else f"{count} repeats of trials"
    return f"{trials} under which a server, a simulator or a process died"


def told_seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def remarks(results: Results, found: Sequence[Condition]) -> list[str]:
    """What else one must know: throughput, times, failures by their cause, repeats, what is not done."""
    lines = []
    made = found[0].throughput if found else None
    if made is not None:
        each = f"; a piece took {made.piece_s:.1f} s, the median" if made.piece_s is not None else ""
        lines.append(
            f"{found[0].label}: {made.pieces} pieces and {made.timeouts} timeouts in {made.minutes:.1f} simulated "
            f"minutes, {told_value(made.per_minute.value, 'pieces/min')}{each}"
        )
    if found:
        times = found[0].latency_ms
        if times["p50"] is not None:
            lines.append(f"inference: {told_ms(times['p50'])} ms p50, {told_ms(times['p99'])} ms p99 on the wall clock")
    for reason, count in causes(results.episodes).items():
        lines.append(f"{count} failed: {reason}")
    repeats = sum(episode.repeats for episode in results.episodes)
    if repeats:
        lines.append(told_repeats(repeats))
    if len(results.episodes) < results.planned:
        lines.append(f"unfinished: {len(results.episodes)} of {results.planned} episodes; the same command goes on")
    unequal = uneven(found)
    return [*lines, unequal] if unequal else lines


def _beside_table(shown: Beside) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), title=escape(shown.title), title_justify="left")
    table.add_column("success, %" if shown.unit == "%" else shown.unit)
    for column in shown.columns:
        table.add_column(escape(column), justify="right")
    last = len(shown.columns) - 1
    units: list[Unit] = [shown.unit if place == last else "%" for place in range(len(shown.columns))]
    ours = [_with_bounds(value, unit) for value, unit in zip(shown.ours, units, strict=True)]
    table.add_row("[bold]this run", *ours, end_section=bool(shown.rows))
    for figure, values in shown.rows:
        cells = ["–" if value is None else told_number(value, unit) for value, unit in zip(values, units, strict=True)]
        table.add_row(escape(figure.policy), *cells)
    if shown.rows:
        table.caption = "below this run: as published, by other code; the JSON and the page have the sources"
        table.caption_justify = "left"
    return table


def _with_bounds(interval: Interval | None, unit: Unit) -> str:
    if interval is None:
        return "–"
    bounds = f"{told_number(interval.low, unit)}–{told_number(interval.high, unit)}"
    return f"[bold]{told_number(interval.value, unit)}[/bold]\n[dim]{bounds}[/dim]"


def _task_table(condition: Condition) -> Group:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("suite")
    table.add_column("", justify="right")
    table.add_column("task")
    for column in ("done", "success, %", "95 % interval"):
        table.add_column(column, justify="right")
    left_out = 0
    for task in condition.tasks:
        if len(condition.tasks) > MOST_TASKS and task.rate.successes == task.rate.trials:
            left_out += 1
            continue
        found = per_cent(task.rate.interval)
        table.add_row(
            escape(task.suite),
            str(task.index),
            escape(plain(task.name)),
            f"{task.rate.successes}/{task.rate.trials}",
            f"{found.value:.0f}",
            f"{found.low:.0f}–{found.high:.0f}",
        )
    return Group(table, *([f"and {left_out} tasks without a failure"] if left_out else []))


def _delay_table(found: Sequence[Condition]) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.caption = "took: a success, on average; reaction: p50 / p99 of how old the look behind an action is"
    table.caption_justify = "left"
    table.add_column("mode")
    unit = found[0].headline.unit
    success = "success, %" if unit == "%" else unit
    for column in ("delay", success, "95 % interval", "trials", "took, s", "reaction, ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, condition in enumerate(found):
        value = condition.headline.value
        ends = number + 1 < len(found) and found[number + 1].mode != condition.mode
        table.add_row(
            condition.mode,
            told_delay(condition),
            told_number(value.value, unit),
            f"{told_number(value.low, unit)}–{told_number(value.high, unit)}",
            str(condition.trials),
            told_seconds(condition.success_s),
            f"{told_ms(condition.reaction_ms['p50'])} / {told_ms(condition.reaction_ms['p99'])}",
            end_section=ends,
        )
    return table


def _condition(condition: Condition, first: Condition) -> dict[str, Any]:
    chains, made, paired = condition.chains, condition.throughput, against(first, condition)
    return {
        "mode": condition.mode,
        "delay_steps": condition.delay_steps,
        "delay_ms": condition.delay_ms,
        "episodes": condition.trials,
        "total": asdict(condition.total),
        "suites": {
            name: {"successes": suite.pooled.successes, "trials": suite.pooled.trials, **asdict(suite.mean)}
            for name, suite in condition.suites.items()
        },
        "tasks": [
            {"suite": task.suite, "task": task.index, "name": task.name, **_rate(task.rate)} for task in condition.tasks
        ],
        "chains": chains and {"mean": asdict(chains.mean), "positions": [_rate(rate) for rate in chains.positions]},
        "throughput": made and asdict(made),
        "latency_ms": dict(condition.latency_ms),
        "reaction_ms": dict(condition.reaction_ms),
        "success_s": condition.success_s,
        "against_first": paired and asdict(paired),
    }


def _rate(rate: Rate) -> dict[str, Any]:
    return {"successes": rate.successes, "trials": rate.trials, **asdict(rate.interval)}


def _published(table: Beside) -> dict[str, Any]:
    def row(values: Sequence[float | None]) -> Mapping[str, float | None]:
        return dict(zip(table.columns, values, strict=True))

    return {
        "title": table.title,
        "unit": table.unit,
        "columns": list(table.columns),
        "rows": [
            {"policy": figure.policy, "figures": row(values), "source": asdict(figure.source)}
            for figure, values in table.rows
        ],
    }
