"""Timing that can be believed: rivals take turns in one run, warm-up apart, every sample kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

StageTimes = Mapping[str, float]
"""Stage -> milliseconds of one call, `total` among them."""


def take_turns(
    rivals: Mapping[str, Callable[[], StageTimes]], rounds: int, warm_up: int, done: Callable[[], None] = lambda: None
) -> dict[str, dict[str, np.ndarray]]:
    """Call each rival once per round, in an order that alternates, so that a machine that drifts favours none.

    done is called after every call, for progress. Returns rival -> stage -> (rounds,) milliseconds, warm-up left out.
    """
    samples: dict[str, list[StageTimes]] = {name: [] for name in rivals}
    for number in range(-warm_up, rounds):
        for name in list(rivals)[:: 1 if number % 2 == 0 else -1]:
            times = rivals[name]()
            if number >= 0:
                samples[name].append(times)
            done()
    return {
        name: {stage: np.array([times[stage] for times in calls]) for stage in calls[0]}
        for name, calls in samples.items()
    }


def ratio_with_spread(slower: np.ndarray, faster: np.ndarray) -> tuple[float, float, float]:
    """Median of the rounds' ratios, and their quartiles: a round's two calls ran next to each other."""
    ratios = slower / faster
    low, middle, high = np.percentile(ratios, [25, 50, 75])
    return float(middle), float(low), float(high)


class Stopwatch:
    """Milliseconds between marks, on the wall clock."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._spans: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        now = time.perf_counter()
        self._spans[stage] = 1e3 * (now - self._last)
        self._last = now

    def times(self) -> dict[str, float]:
        return self._spans | {"total": 1e3 * (self._last - self._start)}
