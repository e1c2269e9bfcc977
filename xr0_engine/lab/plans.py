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
    EXPERT,
    LONG,
    LONG_WINDOW,
    NO_PREFIX,
    RTC,
    WINDOW_4,
    WINDOWS,
    Arm,
    Cell,
    Plan,
    Size,
)
from xr0_engine.lab.tasks import TASKS

SEEDS, DEEP_SEEDS = 5, 3
"""Of the arms that decide; of the deepest, whose window reaches farther than the chunk. Others get one."""
TOLD = "chase-two"
"""A task beside those that decide."""


def find_plan(name: str) -> Plan:
    """Raises ValueError that lists the known ones."""
    if name not in PLANS:
        raise ValueError(f"--plan: expected one of {', '.join(PLANS)}, got {name!r}")
    return PLANS[name]


def _cells(tasks: Iterable[str], arms: Iterable[Arm], seeds: Iterable[int]) -> list[Cell]:
    """Seed by seed, so that a grid that is ended early has whole pairs."""
    listed = list(arms)
    return [Cell(task, arm, seed) for seed in seeds for task in tasks for arm in listed]


STEPS = {"chase-four": 500, "chase-eight": 800, "chase-anywhere": 1_200, "chase-two": 1_200, "two-ways": 1_200}
DEEP = tuple(arm for arm in DEPTHS if arm.depth == 16)
OTHERS = (
    WINDOWS[0],
    WINDOWS[-1],
    COLUMNS,
    DROPOUT_ALONE,
    LONG,
    LONG_WINDOW,
    *(arm for arm in DEPTHS if arm.depth == 2),
)
TRAINED = tuple(arm for arm in ARMS.values() if arm is not EXPERT)

PLANS = {
    "quick": Plan(
        tuple(_cells(("chase-four",), (EXPERT, NO_PREFIX, RTC, WINDOW_4), (0,))),
        Size(steps=dict.fromkeys(TASKS, 200), episodes=32, twins=16, windows=32, delays=(4,)),
    ),
    "committed": Plan(
        (
            *_cells((*DECIDING_TASKS, TOLD), (EXPERT,), (0,)),
            *_cells(DECIDING_TASKS, DECIDING, range(SEEDS)),
            *_cells(DECIDING_TASKS, (*DEEP, *OTHERS), (0,)),
            *_cells((TOLD,), DECIDING, (0,)),
            *_cells(DECIDING_TASKS, DEEP, range(1, DEEP_SEEDS)),
        ),
        Size(steps=STEPS),
    ),
    "whole": Plan(
        (*_cells(TASKS, (EXPERT,), (0,)), *_cells(TASKS, TRAINED, range(SEEDS))),
        Size(steps=STEPS, delays=(1, 2, 3, 4, 5, 6)),
    ),
}
