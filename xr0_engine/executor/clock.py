"""The clock is an argument: the system's in front of a robot, a virtual one in simulation and tests."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Clock(Protocol):
    """Seconds from an arbitrary zero. Observations, actions and reports are all timed on one clock."""

    def now(self) -> float: ...

    def sleep_until(self, time_s: float) -> None:
        """Return at time_s, or earlier; at once if it has passed."""


class SystemClock:
    """The system's monotonic clock: it neither jumps nor follows the time of day. Stamp camera frames with it too."""

    def now(self) -> float:
        return time.monotonic()

    def sleep_until(self, time_s: float) -> None:
        left = time_s - time.monotonic()
        if left > 0:
            time.sleep(left)


class VirtualClock:
    """Time that passes only by sleeping, so that a loop runs as fast as it can and always the same way."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def sleep_until(self, time_s: float) -> None:
        self._now = max(self._now, time_s)

    def jump(self, seconds: float) -> None:
        """Move the clock, backwards too: what a stall, or somebody who sets the time, does."""
        self._now += seconds


_collections = threading.Lock()
_short, _frozen_before = 0, False


@contextmanager
def short_collections() -> Iterator[None]:
    """Keep Python's garbage collector to what is made from here on; of several at once, from the first's begin to the
    last's end.

    A full collection stops every thread for as long as it takes to look at all there is, which can be longer than a
    tick. What exists now is left alone until the end.
    """
    global _short, _frozen_before
    with _collections:
        if not _short:
            # Counts one by one: of hundreds of thousands, milliseconds.
            _frozen_before = gc.get_freeze_count() > 0
            gc.freeze()
        _short += 1
    try:
        yield
    finally:
        with _collections:
            _short -= 1
            # What somebody else froze stays frozen.
            if not _short and not _frozen_before:
                gc.unfreeze()
