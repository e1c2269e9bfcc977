"""The tables of docs/lambda.md, in Markdown, from rows alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xr0_engine.lab.analysis import Estimate, Table, at, over_delays, sensitivity, window_verdict
from xr0_engine.lab.arms import ARMS, DECIDING_TASKS, RTC, WINDOW_4, WINDOW_PAIRS, Condition
from xr0_engine.whole import write_whole

Measure = Callable[[dict[str, Any]], float | None]

MARK = re.compile(r"(<!-- table (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

ANSWERS = {
    "nothing": "The window alone buys nothing: no difference in reaction, by the rule set before the grid was run.",
    "shorter": "The window shortens reaction.",
    "longer": "The window lengthens reaction.",
    "open": "The intervals are too wide to say, or the tasks disagree.",
}


def report(table: Table) -> str:
    """All tables, with their titles."""
    return "\n\n".join(f"{name}\n\n{text}" for name, text in tables(table).items())


def write_tables(table: Table, document: Path) -> None:
    """Put each table between its marks. Raises ValueError for a mark that names no table."""
    made = tables(table)

    def filled(mark: re.Match[str]) -> str:
        name = mark["name"]
        if name not in made:
            raise ValueError(f"{document}: table {name!r}: expected one of {', '.join(made)}")
        return f"{mark[1]}{made[name]}\n{mark[3]}"

    write_whole(document, MARK.sub(filled, document.read_text(encoding="utf-8")))


def tables(table: Table) -> dict[str, str]:
    """Name -> Markdown."""
    return {
        "answer": _answer(table),
        "success": _executed(table, "success", lambda value: 100 * value, ".0f"),
        "reaction": _executed(table, "reaction_steps", lambda value: value, ".1f"),
        "floor": _executed(table, "floor_steps", lambda value: value, ".1f"),
        "distance": _executed(table, "distance", lambda value: value, ".3f"),
        "seam": _executed(table, "seam", lambda value: value, ".2f"),
        "inside": _inside(table),
        "hit": _executed(table, "hit", lambda value: 100 * value, ".0f"),
        "modes": _modes(table),
        "differences": _differences(table),
        "window": _window(table),
        "cells": _cells(table),
    }


def _answer(table: Table) -> str:
    delays = delays_of(table)
    verdict = window_verdict(table, DECIDING_TASKS, delays, WINDOW_4.name, RTC.name)
    lines = [f"{ANSWERS[verdict.answer]} Window 4 minus no window, mean over delays {_listed(delays)}:", ""]
    lines += ["| task | reaction, steps | success, points |", "|---|---|---|"]
    for task, (reaction, success) in verdict.per_task.items():
        lines.append(f"| {task} | {_told(reaction, 1, '+.2f')} | {_told(success, 100, '+.1f')} |")
    return "\n".join(lines)


def _executed(table: Table, name: str, scaled: Callable[[float], float], form: str) -> str:
    """A row for each task, arm and mode; a column for each delay."""
    delays = sorted({entry["delay_steps"] for row in table.rows for entry in row["conditions"]})
    lines = ["| task | arm | mode | " + " | ".join(f"delay {delay}" for delay in delays) + " |"]
    lines.append("|---|---|---|" + "---|" * len(delays))
    for task in tasks_of(table):
        for arm in arms_of(table, task):
            for mode in ("sync", "naive", "guided", "async"):
                found = [table.mean(task, arm, at(Condition(mode, delay), name)) for delay in delays]
                if any(found):
                    cells = " | ".join(_told(one, scaled(1), form) for one in found)
                    lines.append(f"| {task} | {ARMS[arm].title} | {mode} | {cells} |")
    return "\n".join(lines)


def _inside(table: Table) -> str:
    columns: dict[str, Measure] = {
        "prefix, first action": sensitivity("prefix", late=False),
        "prefix, last half": sensitivity("prefix", late=True),
        "image, first action": sensitivity("image", late=False),
        "image, last half": sensitivity("image", late=True),
        "state, first action": sensitivity("state", late=False),
        "state, last half": sensitivity("state", late=True),
    }
    lines = ["| task | arm | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for task in tasks_of(table):
        for arm in arms_of(table, task):
            found = [table.mean(task, arm, measure) for measure in columns.values()]
            if any(found):
                told = " | ".join(_told(one, 1, ".2f") for one in found)
                lines.append(f"| {task} | {ARMS[arm].title} | {told} |")
    return "\n".join(lines)


def _differences(table: Table) -> str:
    delays = delays_of(table)
    columns: dict[str, tuple[Measure, float, str]] = {
        "reaction, steps": (over_delays("async", delays, "reaction_steps"), 1, "+.2f"),
        "success, points": (over_delays("async", delays, "success"), 100, "+.1f"),
        "seam": (over_delays("async", delays, "seam"), 1, "+.3f"),
        "to the image, first": (sensitivity("image", late=False), 1, "+.3f"),
    }
    titles = " | ".join((*columns, "to the prefix, late: times"))
    lines = [f"| task | arm, minus `prefix` | seeds | {titles} |"]
    lines.append("|---|---|---|" + "---|" * (len(columns) + 1))
    for task in tasks_of(table):
        for arm in arms_of(table, task):
            if arm == RTC.name or not ARMS[arm].has_prefix or ARMS[arm].depth != RTC.depth:
                continue
            found = [
                (table.difference(task, arm, RTC.name, measure), scale, form)
                for measure, scale, form in columns.values()
            ]
            seeds = max((one.seeds for one, _, _ in found if one is not None), default=0)
            if seeds:
                found.append((table.ratio(task, arm, RTC.name, sensitivity("prefix", late=True)), 1, ".2f"))
                told = " | ".join(_told(one, scale, form) for one, scale, form in found)
                lines.append(f"| {task} | {ARMS[arm].title} | {seeds} | {told} |")
    return "\n".join(lines)


def _window(table: Table) -> str:
    """Window 4 minus none, by the depth of the action head and the delay."""
    lines = [
        "| task | layers | delay | seeds | reaction, steps | success, points | to the prefix, late: times |",
        "|---" * 7 + "|",
    ]
    for task in tasks_of(table):
        for without, window in WINDOW_PAIRS:
            for delay in delays_of(table):
                condition = Condition("async", delay)
                reaction = table.difference(task, window.name, without.name, at(condition, "reaction_steps"))
                success = table.difference(task, window.name, without.name, at(condition, "success"))
                if success is not None:
                    late = table.ratio(task, window.name, without.name, sensitivity("prefix", late=True))
                    told = f"{_told(reaction, 1, '+.2f')} | {_told(success, 100, '+.1f')} | {_told(late, 1, '.2f')}"
                    lines.append(f"| {task} | {without.depth} | {delay} | {success.seeds} | {told} |")
    return "\n".join(lines)


def _modes(table: Table) -> str:
    """Naive execution of a policy with prefixes minus its asynchronous one, by delay."""
    names = {"reaction_steps": (1.0, "+.2f"), "success": (100.0, "+.1f"), "seam": (1.0, "+.3f")}
    lines = [
        "| task | arm, `naive` minus `async` | delay | reaction, steps | success, points | seam |",
        "|---" * 6 + "|",
    ]
    for task in tasks_of(table):
        for arm in arms_of(table, task):
            for delay in delays_of(table):
                found = [
                    (
                        table.difference(
                            task, arm, arm, at(Condition("naive", delay), name), at(Condition("async", delay), name)
                        ),
                        *form,
                    )
                    for name, form in names.items()
                ]
                if any(one for one, _, _ in found):
                    told = " | ".join(_told(one, scale, form) for one, scale, form in found)
                    lines.append(f"| {task} | {ARMS[arm].title} | {delay} | {told} |")
    return "\n".join(lines)


def _cells(table: Table) -> str:
    lines = [
        "| task | arm | seeds | steps | loss | L1, of the mean's | core-minutes a cell |",
        "|---" * 7 + "|",
    ]
    for task in tasks_of(table):
        for arm in arms_of(table, task):
            rows = [row for row in table.seeds(task, arm).values() if row["training"]]
            if not rows:
                continue
            losses = table.mean(task, arm, lambda row: float(row["training"]["loss"]))
            ratios = table.mean(task, arm, lambda row: row["training"]["l1"] / row["training"]["baseline_l1"])
            minutes = table.mean(task, arm, lambda row: float(row["cpu_s"]) / 60)
            lines.append(
                f"| {task} | {ARMS[arm].title} | {len(rows)} | {rows[0]['size']['steps'][task]} | "
                f"{_told(losses, 1, '.3f')} | {_told(ratios, 1, '.2f')} | {minutes.mean if minutes else 0:.1f} |"
            )
    hours = sum(row["cpu_s"] for row in table.rows) / 3600
    processors = ", ".join(sorted({row["processor"] for row in table.rows}))
    return "\n".join([*lines, "", f"{len(table.rows)} cells in all, {hours:.1f} core-hours ({processors})."])


def tasks_of(table: Table) -> list[str]:
    return sorted({row["task"] for row in table.rows})


def arms_of(table: Table, task: str) -> list[str]:
    """In the order of ARMS."""
    found = {row["arm"] for row in table.rows if row["task"] == task}
    return [name for name in ARMS if name in found]


def delays_of(table: Table) -> tuple[int, ...]:
    return tuple(sorted({delay for row in table.rows for delay in row["size"]["delays"]}))


def _told(one: Estimate | None, scale: float, form: str) -> str:
    """A mean with its interval."""
    if one is None:
        return ""
    if one.low is None or one.high is None:
        return f"{scale * one.mean:{form}}"
    return f"{scale * one.mean:{form}} ({scale * one.low:{form}} to {scale * one.high:{form}})"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
