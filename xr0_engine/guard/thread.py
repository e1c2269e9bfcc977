"""A guard on a thread of its own: whoever drives a robot hands over and looks in later, and never waits."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from xr0_engine.guard.guard import Guard
from xr0_engine.types import ActionChunk, GuardWarning, Observation

MOST_WAITING = 4
"""Observations that wait to be looked at; where more come, the oldest and its chunk are left out."""
FAILED = "failed"
"""The name of the last warning of a guard that cannot look any more."""


class GuardThread:
    """An executor's Watcher (executor/interfaces.py). stops: whether a warning is to end the run.

    skipped: observations that were left out, or their chunks, because the guard was slower than the policy. An error in
    looking is a warning too, `failed`, and the last one: nobody is to take its silence for calm.
    """

    def __init__(self, guard: Guard, stops: bool = False) -> None:
        self.guard, self.stops, self.skipped = guard, stops, 0
        # (number of the observation, itself and its time, or its chunk)
        self._waiting: deque[tuple[int, tuple[Observation, float] | ActionChunk]] = deque()
        self._number = self._left_out = 0
        self._forgets = False
        self._found: deque[GuardWarning] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="xr0-guard", daemon=True)
        self._thread.start()

    def see(self, observation: Observation, time_s: float) -> None:
        with self._changed:
            self._number += 1
            numbers = {number for number, given in self._waiting if not isinstance(given, ActionChunk)}
            if len(numbers) == MOST_WAITING:
                self._leave_out(min(numbers))
            self._put((observation, time_s))

    def plan(self, chunk: ActionChunk) -> None:
        with self._changed:
            # Without its observation it would be held against another one.
            if self._number > self._left_out:
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
        if not self._closed:
            self._waiting.append((self._number, given))
            self._changed.notify()

    def _leave_out(self, upto: int) -> None:
        while self._waiting and self._waiting[0][0] <= upto:
            self._waiting.popleft()
        self._left_out, self._forgets = upto, True
        self.skipped += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                _, given = self._waiting.popleft()
                forgets, self._forgets = self._forgets, False
            found, goes_on = looked_at(self.guard, partial(_look, given, forgets))
            self._found.extend(found)
            if not goes_on:
                with self._changed:
                    self._closed = True
                    self._waiting.clear()
                return


class GuardInLoop:
    """The same without a thread, for simulated time, where it is always the same way."""

    def __init__(self, guard: Guard, stops: bool = False) -> None:
        self.guard, self.stops, self.skipped = guard, stops, 0
        self._found: list[GuardWarning] = []
        self._goes_on = True

    def see(self, observation: Observation, time_s: float) -> None:
        self._take((observation, time_s))

    def plan(self, chunk: ActionChunk) -> None:
        self._take(chunk)

    def poll(self) -> list[GuardWarning]:
        found, self._found = self._found, []
        return found

    def close(self, patience_s: float) -> None: ...

    def _take(self, given: tuple[Observation, float] | ActionChunk) -> None:
        if self._goes_on:
            found, self._goes_on = looked_at(self.guard, partial(_look, given, False))
            self._found += found


def looked_at(guard: Guard, look: Callable[[Guard], list[GuardWarning]]) -> tuple[list[GuardWarning], bool]:
    """What a guard finds, and whether it can go on: an error becomes its last warning."""
    try:
        return look(guard), True
    # Whatever it is: the robot must not go on as if it were looked after, nor end by it.
    except Exception as error:
        detail = f"the guard looks no more: {type(error).__name__}: {error}"
        return [GuardWarning(FAILED, 1.0, 0.5, detail, guard.time_s)], False


def _look(given: tuple[Observation, float] | ActionChunk, forgets: bool, guard: Guard) -> list[GuardWarning]:
    if forgets:
        guard.forget()
    return guard.plan(given) if isinstance(given, ActionChunk) else guard.see(*given)
