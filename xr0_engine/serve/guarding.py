"""The guard of a server: what its clients see and are answered, looked at after the reply, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from xr0_engine.guard import Guard, read_guard
from xr0_engine.guard.thread import looked_at
from xr0_engine.types import (
    ActionChunk,
    FileError,
    GuardWarning,
    Observation,
    RobotInfo,
    TokenizedObservation,
)

CLOSE_S = 0.5

Answered = tuple[Observation | TokenizedObservation, ActionChunk, float]
"""With the time of the observation, seconds on the client's clock or ours."""
Told = Callable[[int, list[GuardWarning]], None]


class ServerGuard:
    """A Guard for each client. Of each client the newest answer waits, no more: where the guard is slower than the
    engine, answers are left out. path: guard.json. Raises FileError, OSError for a file that cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path, self._profiles = path, read_guard(path)
        # None: it has failed, and looks no more.
        self._guards: dict[tuple[int, str], Guard | None] = {}
        # Clients of whom an answer was left out since the last that was looked at.
        self._gaps: set[int] = set()
        # Client -> its newest answer; None: it has gone.
        self._waiting: dict[int, Answered | None] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def start(self, robots: Mapping[str, RobotInfo], told: Told) -> tuple[str, ...]:
        """Begin. robots: what is served; told: called in the running event loop with a client's number and its new
        warnings. Returns the robot types that are guarded. Raises FileError for thresholds of other robots."""
        guarded = tuple(name for name in self._profiles if name in robots)
        if not guarded:
            raise FileError(
                f"{self._path}: robots: expected one of {', '.join(robots)}, which are served, got "
                f"{', '.join(self._profiles)}, "
                "thresholds of another robot: --guard takes another file, or none"
            )
        for name in guarded:
            self._profiles[name].check(self._path, robots[name])
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, args=(loop, told), name="xr0-guard", daemon=True)
        self._thread.start()
        return guarded

    def answered(self, number: int, observation: Observation | TokenizedObservation, chunk: ActionChunk) -> None:
        """Returns at once."""
        if chunk.robot_type in self._profiles:
            # Now, not when it is looked at, which may be any time later.
            time_s = time.monotonic() if observation.timestamp_s is None else observation.timestamp_s
            self._put(number, (observation, chunk, time_s))

    def disconnected(self, number: int) -> None:
        self._put(number, None)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)

    def _put(self, number: int, answered: Answered | None) -> None:
        with self._changed:
            if self._waiting.get(number) is not None:
                self._gaps.add(number)
            self._waiting[number] = answered
            self._changed.notify()

    def _work(self, loop: asyncio.AbstractEventLoop, told: Told) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                number = next(iter(self._waiting))
                answered = self._waiting.pop(number)
                has_gap = number in self._gaps
                self._gaps.discard(number)
            if answered is None:
                self._guards = {key: guard for key, guard in self._guards.items() if key[0] != number}
            elif warnings := self._look(number, has_gap, *answered):
                # A loop that has closed meanwhile has nobody to tell.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(told, number, warnings)

    def _look(
        self,
        number: int,
        has_gap: bool,
        observation: Observation | TokenizedObservation,
        chunk: ActionChunk,
        time_s: float,
    ) -> list[GuardWarning]:
        key = number, chunk.robot_type
        if key not in self._guards:
            self._guards[key] = Guard(self._profiles[chunk.robot_type])
        guard = self._guards[key]
        if guard is None:
            return []

        def look(guard: Guard) -> list[GuardWarning]:
            if has_gap:
                guard.forget()
            return guard.see(observation, time_s) + guard.plan(chunk)

        found, goes_on = looked_at(guard, look)
        if not goes_on:
            self._guards[key] = None
        return found
