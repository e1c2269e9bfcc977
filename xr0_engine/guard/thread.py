"""A guard on a thread of its own: whoever drives a robot hands over and looks in later, and never waits."""

from __future__ import annotations

import threading
from collections import deque

from xr0_engine.guard.guard import Guard
from xr0_engine.types import ActionChunk, GuardWarning, Observation

MOST_WAITING = 4
"""Observations and chunks that wait to be looked at; where more come the oldest are left out."""


class GuardThread:
    """An executor's Watcher (executor/interfaces.py). stops: whether a warning is to end the run.

    skipped: what was left out because the guard was slower than the policy.
    """

    def __init__(self, guard: Guard, stops: bool = False) -> None:
        self.guard, self.stops, self.skipped = guard, stops, 0
        self._waiting: deque[tuple[Observation, float] | ActionChunk] = deque()
        self._found: deque[GuardWarning] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="xr0-guard", daemon=True)
        self._thread.start()

    def see(self, observation: Observation, time_s: float) -> None:
        self._put((observation, time_s))

    def plan(self, chunk: ActionChunk) -> None:
        self._put(chunk)

    def poll(self) -> list[GuardWarning]:
        """The warnings since the last call. Returns at once."""
        found = []
        while self._found:
            found.append(self._found.popleft())
        return found

    def close(self, patience_s: float) -> None:
        """Look at what is waiting, as long as patience lasts."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience_s)

    def _put(self, given: tuple[Observation, float] | ActionChunk) -> None:
        with self._changed:
            if len(self._waiting) == MOST_WAITING:
                self._waiting.popleft()
                self.skipped += 1
            self._waiting.append(given)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                given = self._waiting.popleft()
            if isinstance(given, ActionChunk):
                self._found.extend(self.guard.plan(given))
            else:
                self._found.extend(self.guard.see(*given))


class GuardInLoop:
    """The same without a thread, for simulated time, where it is always the same way."""

    def __init__(self, guard: Guard, stops: bool = False) -> None:
        self.guard, self.stops = guard, stops
        self._found: list[GuardWarning] = []

    def see(self, observation: Observation, time_s: float) -> None:
        self._found += self.guard.see(observation, time_s)

    def plan(self, chunk: ActionChunk) -> None:
        self._found += self.guard.plan(chunk)

    def poll(self) -> list[GuardWarning]:
        found, self._found = self._found, []
        return found

    def close(self, patience_s: float) -> None: ...
