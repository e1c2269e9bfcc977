"""What the loop does with a guard: hands over, and counts, records and tells what has struck it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from xr0_engine.executor.interfaces import Watcher
from xr0_engine.executor.report import Report
from xr0_engine.executor.worker import Outcome
from xr0_engine.types import ActionChunk, Observation

MOST_TOLD = 100
"""Warnings that a report holds; all are counted."""
CLOSE_S = 0.5


class Guarding:
    """guard: None has every call do nothing. record: of the executor, a recording's line. end: of the executor, called
    with the reason at the first warning of a guard that stops."""

    def __init__(
        self,
        guard: Watcher | None,
        report: Report,
        record: Callable[..., Any],
        end: Callable[[str], Any],
    ) -> None:
        self._guard, self._report, self._record, self._end = guard, report, record, end

    def see(self, observation: Observation, time_s: float) -> None:
        if self._guard is not None:
            self._guard.see(observation, time_s)

    def plan(self, outcome: Outcome) -> None:
        """The outcome is a chunk that is about to be executed."""
        if self._guard is not None and isinstance(outcome.result, ActionChunk):
            self._guard.plan(outcome.result)

    def look(self) -> bool:
        """Whether the run ends by what has struck it: nothing more is to be executed."""
        if self._guard is None:
            return False
        ends = False
        for warning in self._guard.poll():
            self._report.counts[f"guard {warning.name}"] += 1
            told = asdict(warning)
            if len(self._report.warnings) < MOST_TOLD:
                self._report.warnings.append(told)
            self._record("warning", **told)
            if self._guard.stops:
                ends = True
                self._end(f"guard, {warning.name}: {warning.detail}")
        return ends

    def close(self) -> None:
        if self._guard is not None:
            self._guard.close(CLOSE_S)
            self.look()
            if self._guard.skipped:
                self._report.counts["guard skipped"] = self._guard.skipped
