"""Which cells are run, and how much work each is: `quick` shows the shape, `committed` is what docs/lambda.md has."""

from __future__ import annotations

from collections.abc import Iterable

from xr0_engine.lab.arms import (
    ARMS,
    COLUMNS,
    DECIDING,
    DECIDING_TASKS,
    DEPTHS,
    DROPOUT_ALONE,
    LONG,
    LONG_WINDOW,
    NO_PREFIX,
    OFFSET_10,
    RTC,
    WINDOW_4,
    WINDOWS,
    Arm,
    Cell,
    Plan,
    Size,
)
from xr0_engine.lab.tasks import TASKS

SEEDS = 5
"""Of the arms that decide."""


def find_plan(name: str) -> Plan:
    """Raises ValueError that lists the known ones."""
    if name not in PLANS:
        raise ValueError(f"--plan: expected one of {', '.join(PLANS)}, got {name!r}")
    return PLANS[name]


def _cells(tasks: Iterable[str], arms: Iterable[Arm], seeds: Iterable[int]) -> list[Cell]:
    """Seed by seed, so that a grid that is ended early has whole pairs."""
    listed = list(arms)
    return [Cell(task, arm, seed) for seed in seeds for task in tasks for arm in listed]


STEPS = {"chase-four": 500, "chase-eight": 800, "chase-anywhere": 1_200, "chase-two": 1_200, "two-ways": 800}
OTHERS = tuple(arm for arm in (*WINDOWS, OFFSET_10, COLUMNS, DROPOUT_ALONE, LONG, LONG_WINDOW) if arm is not WINDOW_4)

PLANS = {
    "quick": Plan(
        tuple(_cells(("chase-four",), (NO_PREFIX, RTC, WINDOW_4), (0,))),
        Size(steps=dict.fromkeys(TASKS, 200), episodes=32, twins=16, windows=32, delays=(4,)),
    ),
    "committed": Plan(
        (
            *_cells(DECIDING_TASKS, DECIDING, range(SEEDS)),
            *_cells(DECIDING_TASKS, (*OTHERS, *DEPTHS), range(2)),
        ),
        Size(steps=STEPS),
    ),
    "whole": Plan(tuple(_cells(TASKS, ARMS.values(), range(SEEDS))), Size(steps=STEPS, delays=(1, 2, 3, 4, 5, 6))),
}
