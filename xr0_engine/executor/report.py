"""What an execution did: counts that add up, and distributions of bounded size however long it runs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np

# A bin is 12 % wide: as exact as a percentile of times needs to be.
BINS_PER_DECADE = 20
LOWEST_S = 1e-6
DECADES = 8

COUNTS = {
    "executed": "steps with an action of a chunk",
    "waited": "steps at rest until the first chunk, or in mode sync until the next",
    "held": "steps without an action: starved",
    "missed": "steps that passed without any command",
    "late": "actions dropped because their time had passed when the chunk came",
    "committed": "actions of a chunk that the chunk before it executes: its prefix",
    "replaced": "actions replaced by those of a newer chunk",
    "skipped": "actions whose step passed without a command",
    "discarded": "actions dropped because the clock jumped",
    "unused": "actions beyond those that mode sync executes of each chunk",
    "left": "actions still to come at the end",
    "inferences": "inferences started",
    "chunks": "chunks accepted",
    "failed": "inferences that raised an error",
    "rejected": "chunks refused: wrong shape, not finite, or without the prefix",
    "hung": "inferences that took longer than hang_s",
    "void": "inferences whose outcome was dropped: the clock jumped meanwhile",
    "open": "inferences whose outcome had not come when the run ended",
    "outdated": "chunks that were no use: too late for any action",
    "prefix_short": "inferences whose prefix could not cover the delay: it would exceed max_prefix",
    "sensors": "observations that could not be made: sensors missing or stale",
    "mistimed": "observations stamped by another clock: from the future, or impossibly old",
    "deadline_misses": "commands not sent before the next one was due",
    "clock_jumps": "times the clock went backwards",
}
"""Every count in a report, with its meaning."""


class Histogram:
    """Times in logarithmic bins, from a microsecond up; percentiles are the upper edge of their bin."""

    def __init__(self) -> None:
        self.bins = np.zeros(BINS_PER_DECADE * DECADES, np.int64)
        self.maximum_s = 0.0

    def add(self, seconds: float) -> None:
        place = math.log10(max(seconds, LOWEST_S) / LOWEST_S) * BINS_PER_DECADE
        self.bins[min(int(place), len(self.bins) - 1)] += 1
        self.maximum_s = max(self.maximum_s, seconds)

    @property
    def count(self) -> int:
        return int(self.bins.sum())

    def percentile_s(self, percent: float) -> float:
        """At least percent of the times are at most this; 0 if there are none."""
        if not self.count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.bins), self.count * percent / 100))
        return min(LOWEST_S * 10 ** ((index + 1) / BINS_PER_DECADE), self.maximum_s)

    def to_json(self) -> dict[str, Any]:
        """Milliseconds: percentiles, and the bins that hold something as upper edge -> count."""
        edges = LOWEST_S * 10 ** (np.arange(1, len(self.bins) + 1) / BINS_PER_DECADE)
        return {
            "count": self.count,
            "p50_ms": 1e3 * self.percentile_s(50),
            "p99_ms": 1e3 * self.percentile_s(99),
            "p99_9_ms": 1e3 * self.percentile_s(99.9),
            "max_ms": 1e3 * self.maximum_s,
            "bins_ms": {f"{1e3 * edges[index]:.4g}": int(self.bins[index]) for index in np.flatnonzero(self.bins)},
        }


class Steps:
    """Sizes of steps between neighbouring actions, per column (A,): their number, mean and largest."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.largest = np.zeros(width)
        self._sum = np.zeros(width)

    def add(self, step: np.ndarray) -> None:
        size = np.abs(step)
        self.count += 1
        self._sum += size
        np.maximum(self.largest, size, out=self.largest)

    @property
    def mean(self) -> np.ndarray:
        return self._sum / max(self.count, 1)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean.tolist(), "largest": self.largest.tolist()}


class Report:
    """counts: see COUNTS, and `clipped position`, `clipped velocity`, `clipped jump` (commands that a limit changed),
    `guard NAME` (a guard's warnings), guard skipped (what it had no time for).
    Every inference ends in one of five: inferences = chunks + failed + rejected + void + open.

    jitter: how late each command was. delay: from observation to chunk, warm-up and outliers included.
    seams: steps of the actions from one chunk to the next; inner: those within chunks, to compare with.
    last_error: of the policy, a chunk or the sensors; None if all went well. ended: why the execution ended.
    warnings: the first of a guard's, types.GuardWarning as JSON.
    """

    def __init__(self, width: int) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
        self.jitter = Histogram()
        self.delay = Histogram()
        self.seams = Steps(width)
        self.inner = Steps(width)
        self.last_error: str | None = None
        self.ended: str | None = None
        self.warnings: list[dict[str, Any]] = []

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "jitter": self.jitter.to_json(),
            "delay": self.delay.to_json(),
            "seams": self.seams.to_json(),
            "inner": self.inner.to_json(),
            "last_error": self.last_error,
            "ended": self.ended,
            "warnings": self.warnings,
        }
