"""The figures of docs/lambda.md, as PNG, from rows alone; and one of the tasks themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xr0_engine.evaluation.benchmark import Mode
from xr0_engine.lab.analysis import Table, at, estimate, sensitivity
from xr0_engine.lab.arms import ARMS, DECIDING, DECIDING_TASKS, DEPTHS, RTC, WINDOW_4, WINDOW_PAIRS, WINDOWS, Condition
from xr0_engine.lab.tables import delays_of, tasks_of
from xr0_engine.plot import COLORS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROFILED = (RTC, *WINDOWS, next(arm for arm in DECIDING if arm.name == "released"))
LINES: tuple[tuple[str, Mode], ...] = (
    ("no-prefix", "sync"),
    ("no-prefix", "naive"),
    ("no-prefix", "guided"),
    ("rtc", "async"),
    ("window-4", "async"),
    ("released", "async"),
    ("expert", "async"),
)
"""(arm, mode) of the curves over the delay."""
SCENES = (("chase-eight", 3), ("chase-two", 1), ("two-ways", 2))
"""Tasks that are pictured, with the seed of an episode."""


def draw_all(table: Table, folder: Path) -> list[Path]:
    """Every figure that the rows give. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, drawn in (
        ("tasks", lambda: _tasks()),
        ("success", lambda: _over_delay(table, "success", "success, %", 100)),
        ("reaction", lambda: _over_delay(table, "reaction_steps", "reaction, control steps", 1)),
        ("seam", lambda: _over_delay(table, "seam", "change at a seam", 1)),
        ("sensitivity", lambda: _sensitivities(table)),
        ("attention", lambda: _attention(table)),
        ("depth", lambda: _depth(table)),
    ):
        with style():
            figure = drawn()
            if figure is not None:
                path = folder / f"lambda-{name}.png"
                figure.savefig(path, dpi=110)
                made.append(path)
    return made


def _tasks() -> Figure:
    from xr0_engine.lab.tasks import PointEnv, find_task

    figure, places = _panels(len(SCENES), width=2.4, height=2.7)
    for axes, (name, seed) in zip(places, SCENES, strict=True):
        env = PointEnv(find_task(name))
        env.begin(seed)
        env.steps = env.changes[1].step
        axes.imshow(env.picture(), interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


def _over_delay(table: Table, name: str, label: str, scale: float) -> Figure | None:
    """A panel for each task, a curve for each (arm, mode)."""
    delays = delays_of(table)
    curves = {
        task: [
            (arm, mode, [table.mean(task, arm, at(Condition(mode, delay), name)) for delay in delays])
            for arm, mode in LINES
        ]
        for task in tasks_of(table)
    }
    shown = {task: lines for task, lines in curves.items() if any(any(points) for _, _, points in lines)}
    if not shown:
        return None
    figure, places = _panels(len(shown))
    for axes, (task, lines) in zip(places, shown.items(), strict=True):
        # The expert is no colour's: what it reaches is a bound.
        for number, ((arm, mode, points), color) in enumerate(zip(lines, (*COLORS, "0.5"), strict=True)):
            known = [(delay, one) for delay, one in zip(delays, points, strict=True) if one is not None]
            if not known:
                continue
            # Side by side, so that intervals of one delay are told apart.
            x = [delay + 0.09 * (number - len(lines) / 2) for delay, _ in known]
            low = [scale * (one.mean - (one.mean if one.low is None else one.low)) for _, one in known]
            high = [scale * ((one.mean if one.high is None else one.high) - one.mean) for _, one in known]
            label_of = mode if arm == "no-prefix" else ARMS[arm].title
            axes.errorbar(
                x, [scale * one.mean for _, one in known], [low, high], color=color, marker="o", ms=3.5,
                capsize=2, label=label_of,
            )  # fmt: skip
        axes.set_title(task)
        axes.set_xticks(delays)
        axes.set_xlabel("delay, control steps")
    places[0].set_ylabel(label)
    _legend(figure, places[0])
    return figure


def _sensitivities(table: Table) -> Figure | None:
    """How far each action behind the prefix moves when the prefix, or the image, is another one."""
    tasks = [task for task in DECIDING_TASKS if task in tasks_of(table)]
    if not tasks:
        return None
    figure, places = _panels(2 * len(tasks))
    for axes, (task, to) in zip(places, [(task, to) for task in tasks for to in ("prefix", "image")], strict=True):
        for number, arm in enumerate(PROFILED):
            rows = [row["inside"] for row in table.seeds(task, arm.name).values() if row.get("inside")]
            if not rows:
                continue
            length = rows[0]["prefix_length"]
            profile = np.array([inside["sensitivity"][to][length:] for inside in rows])
            x = np.arange(1, profile.shape[1] + 1)
            axes.plot(x, profile.mean(0), color=COLORS[number], marker=".", label=arm.title)
            if len(rows) > 1:
                bounds = [estimate(column) for column in profile.T]
                low = [one.low for one in bounds if one is not None and one.low is not None]
                high = [one.high for one in bounds if one is not None and one.high is not None]
                axes.fill_between(x, low, high, color=COLORS[number], alpha=0.15, linewidth=0)
        axes.set_title(f"{task}: another {to}")
        axes.set_xlabel("actions behind the prefix")
        axes.set_ylim(bottom=0)
    places[0].set_ylabel("change of the action, in std")
    _legend(figure, places[0])
    return figure


def _attention(table: Table) -> Figure | None:
    """Where the noisy actions look, by layer, mean over flow steps and seeds."""
    shown = [
        (task, arm)
        for task in DECIDING_TASKS
        for arm in (RTC, WINDOW_4)
        if any(row.get("inside") for row in table.seeds(task, arm.name).values())
    ]
    if not shown:
        return None
    figure, places = _panels(len(shown), width=2.9)
    for axes, (task, arm) in zip(places, shown, strict=True):
        rows = [row["inside"] for row in table.seeds(task, arm.name).values() if row.get("inside")]
        groups = list(rows[0]["attention"])
        # (groups, seeds, flow steps, layers)
        masses = np.array([[inside["attention"][group] for inside in rows] for group in groups]).mean((1, 2))
        base = np.zeros(masses.shape[1])
        for number, (group, mass) in enumerate(zip(groups, masses, strict=True)):
            axes.bar(np.arange(1, len(mass) + 1), mass, bottom=base, color=COLORS[number % len(COLORS)], label=group)
            base += mass
        axes.set_title(f"{task}\n{arm.title}")
        axes.set_xlabel("layer")
        axes.set_xticks(range(1, len(base) + 1))
        axes.grid(visible=False)
    places[0].set_ylabel("share of attention")
    _legend(figure, places[0])
    return figure


def _depth(table: Table) -> Figure | None:
    """What late actions owe to the prefix, over the depth of the action head."""
    tasks = [task for task in tasks_of(table) if any(table.seeds(task, arm.name) for arm in DEPTHS)]
    if not tasks:
        return None
    figure, places = _panels(len(tasks))
    families = {
        RTC.title: [without for without, _ in WINDOW_PAIRS],
        WINDOW_4.title: [window for _, window in WINDOW_PAIRS],
    }
    measure: Callable[[dict[str, Any]], float | None] = sensitivity("prefix", late=True)
    for axes, task in zip(places, tasks, strict=True):
        for number, (title, arms) in enumerate(families.items()):
            found = [(arm.depth, table.mean(task, arm.name, measure)) for arm in arms]
            known = [(depth, one) for depth, one in found if one is not None]
            if known:
                axes.plot(
                    [depth for depth, _ in known],
                    [one.mean for _, one in known],
                    color=COLORS[number],
                    marker="o",
                    label=title,
                )
        axes.set_xscale("log", base=2)
        axes.set_xticks([2, 4, 8, 16], labels=["2", "4", "8", "16"])
        axes.set_xlabel("layers of the action head")
        axes.set_title(task)
        axes.set_ylim(bottom=0)
    places[0].set_ylabel("change of late actions\nby another prefix, in std")
    _legend(figure, places[0])
    return figure


def _panels(count: int, width: float = 3.4, height: float = 3.1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6)
