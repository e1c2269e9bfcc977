"""What the grid says: means over training seeds with their intervals, and paired differences between arms.

Written before the grid was run. The unit is the training seed: episodes of one policy tell how well that policy is
known, not how well its arm is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from xr0_engine.lab.arms import Condition

SAME_REACTION_STEPS = 0.5
"""Control steps: a difference in reaction within this is none. An action is executed per step, so that a policy which
reacts one call later reacts several steps later."""

# Student's t at 97.5 % for 1, 2, ... degrees of freedom; more than ten seeds are not asked of anyone.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. low, high: its 95 % interval by Student's t, None of a single seed. seeds: how many."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def is_within(self, bound: float) -> bool:
        """Whether the whole interval lies within bound of zero."""
        return self.low is not None and self.high is not None and -bound <= self.low and self.high <= bound


@dataclass(frozen=True)
class Table:
    """Rows of results (runner.Row as JSON), one for each cell that is done."""

    rows: Sequence[dict[str, Any]]

    def seeds(self, task: str, arm: str) -> dict[int, dict[str, Any]]:
        return {row["seed"]: row for row in self.rows if row["task"] == task and row["arm"] == arm}

    def mean(self, task: str, arm: str, measure: Callable[[dict[str, Any]], float | None]) -> Estimate | None:
        """Over an arm's seeds; None if none of them has the measure."""
        values = (measure(row) for row in self.seeds(task, arm).values())
        return estimate(value for value in values if value is not None)

    def difference(
        self,
        task: str,
        arm: str,
        other: str,
        measure: Callable[[dict[str, Any]], float | None],
        of_other: Callable[[dict[str, Any]], float | None] | None = None,
    ) -> Estimate | None:
        """arm minus other, over the seeds that both have: same data, same first weights. of_other: the other's measure,
        where it is another one, as of another mode."""
        return estimate(a - b for a, b in self._pairs(task, arm, other, measure, of_other or measure))

    def ratio(
        self, task: str, arm: str, other: str, measure: Callable[[dict[str, Any]], float | None]
    ) -> Estimate | None:
        """arm over other, seed by seed as difference."""
        return estimate(a / b for a, b in self._pairs(task, arm, other, measure, measure) if b)

    def _pairs(
        self,
        task: str,
        arm: str,
        other: str,
        measure: Callable[[dict[str, Any]], float | None],
        of_other: Callable[[dict[str, Any]], float | None],
    ) -> Iterator[tuple[float, float]]:
        ours, theirs = self.seeds(task, arm), self.seeds(task, other)
        for seed in sorted(ours.keys() & theirs.keys()):
            a, b = measure(ours[seed]), of_other(theirs[seed])
            if a is not None and b is not None:
                yield a, b


def estimate(values: Iterable[float]) -> Estimate | None:
    """None of no value. Raises ValueError for more seeds than STUDENT knows."""
    found = list(values)
    if not found:
        return None
    mean = fmean(found)
    if len(found) == 1:
        return Estimate(mean, None, None, 1)
    if len(found) - 1 > len(STUDENT):
        raise ValueError(f"seeds: expected at most {len(STUDENT) + 1}, got {len(found)}")
    half = STUDENT[len(found) - 2] * stdev(found) / math.sqrt(len(found))
    return Estimate(mean, mean - half, mean + half, len(found))


def at(condition: Condition, name: str) -> Callable[[dict[str, Any]], float | None]:
    """A measure of a cell under a condition, such as `success`, `distance`, `reaction_steps`, `seam`, `jerk`."""

    def measure(row: dict[str, Any]) -> float | None:
        for entry in row["conditions"]:
            if entry["mode"] == condition.mode and entry["delay_steps"] == condition.delay_steps:
                value = entry["measures"].get(name)
                return None if value is None else float(value)
        return None

    return measure


def over_delays(mode: str, delays: Sequence[int], name: str) -> Callable[[dict[str, Any]], float | None]:
    """The mean of a measure over delays; None where one is missing."""

    def measure(row: dict[str, Any]) -> float | None:
        found = [at(Condition(mode, delay), name)(row) for delay in delays]  # type: ignore[arg-type]
        known = [value for value in found if value is not None]
        return fmean(known) if known and len(known) == len(found) else None

    return measure


def sensitivity(to: str, late: bool) -> Callable[[dict[str, Any]], float | None]:
    """Of the actions behind the prefix to a swapped `prefix`, `image` or `state`; late: of the last half of them, else
    the first action alone."""

    def measure(row: dict[str, Any]) -> float | None:
        inside = row.get("inside")
        if not inside or to not in inside["sensitivity"]:
            return None
        free = inside["sensitivity"][to][inside["prefix_length"] :]
        return fmean(free[len(free) // 2 :]) if late else float(free[0])

    return measure


@dataclass(frozen=True)
class Verdict:
    """Whether the window alone shortens reaction: `nothing`, `shorter`, `longer`, or `open` where the intervals are too
    wide to say. per_task: task -> (difference in reaction, in success), window minus prefix."""

    answer: str
    per_task: dict[str, tuple[Estimate | None, Estimate | None]]


def window_verdict(table: Table, tasks: Sequence[str], delays: Sequence[int], arm: str, other: str) -> Verdict:
    """By the rule that docs/lambda.md had before the grid was run, over the mean of the delays."""
    per_task, answers = {}, []
    for task in tasks:
        reaction = table.difference(task, arm, other, over_delays("async", delays, "reaction_steps"))
        success = table.difference(task, arm, other, over_delays("async", delays, "success"))
        per_task[task] = reaction, success
        answers.append(_answer(reaction))
    agreed = answers[0] if len(set(answers)) == 1 else "open"
    return Verdict(agreed, per_task)


def _answer(reaction: Estimate | None) -> str:
    if reaction is not None and reaction.is_certain and abs(reaction.mean) > SAME_REACTION_STEPS:
        return "shorter" if reaction.mean < 0 else "longer"
    if reaction is not None and reaction.is_within(SAME_REACTION_STEPS):
        return "nothing"
    return "open"
