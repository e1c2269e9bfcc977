"""The actions to come and those just executed, by step. Step n is at n / rate_hz on the executor's clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from xr0_engine.robot.layouts import Frame

# Enough for the oldest observation that a prefix may start at: two seconds at 30 Hz.
HISTORY_STEPS = 64


@dataclass(frozen=True, eq=False)
class Planned:
    """One action that is due. row: (A,), see Frame; chunk: its chunk's number; index: its place in the chunk."""

    row: np.ndarray
    chunk: int
    index: int


@dataclass(frozen=True)
class Placement:
    """What became of a chunk's T actions, and of those it met.

    takeover: first step that the chunk gives; None if it came too late for any. committed: leading actions that an
    earlier chunk gives or gave (the prefix). late: actions whose time had passed. planned: actions that are now due.
    replaced: an earlier chunk's actions that are due no more.
    """

    takeover: int | None
    committed: int
    late: int
    planned: int
    replaced: int


class Timeline:
    """Each step holds at most one action. Everything that leaves without being taken is returned, to be counted."""

    def __init__(self) -> None:
        self._planned: dict[int, Planned] = {}
        self._history: deque[tuple[int, np.ndarray]] = deque(maxlen=HISTORY_STEPS)

    def __len__(self) -> int:
        """Actions that are due."""
        return len(self._planned)

    @property
    def end(self) -> int | None:
        """The step after the last planned one; None if nothing is planned."""
        return max(self._planned) + 1 if self._planned else None

    def place(self, rows: np.ndarray, first: int, prefix: int, step: int, chunk: int) -> Placement:
        """Put a chunk's rows (T, A) on the steps first .. first + T - 1, from `step` on, the next to be executed.

        It takes over right after its prefix: what is planned for the prefix's steps is committed and stays. If their
        time has passed it takes over at `step`, at the action that matches it.
        """
        end = first + len(rows)
        committed_end = step if self.end is None else min(first + prefix, self.end)
        takeover = max(step, first, committed_end)
        committed = min(prefix, takeover - first)
        if takeover >= end:
            return Placement(None, committed, len(rows) - committed, 0, 0)
        kept = {planned_step: planned for planned_step, planned in self._planned.items() if planned_step < takeover}
        replaced = len(self._planned) - len(kept)
        ours = range(takeover - first, len(rows))
        self._planned = kept | {first + index: Planned(rows[index], chunk, index) for index in ours}
        late = takeover - first - committed
        return Placement(takeover, committed, late, end - takeover, replaced)

    def take(self, step: int) -> Planned | None:
        """The action of a step, which is then due no more."""
        return self._planned.pop(step, None)

    def peek(self, step: int) -> Planned | None:
        return self._planned.get(step)

    def drop_before(self, step: int) -> int:
        """Forget the planned actions before a step. Returns how many there were."""
        passed = [planned_step for planned_step in self._planned if planned_step < step]
        for planned_step in passed:
            del self._planned[planned_step]
        return len(passed)

    def clear(self) -> int:
        """Forget all, the history too. Returns how many actions were planned."""
        count = len(self._planned)
        self._planned.clear()
        self._history.clear()
        return count

    def executed(self, step: int, row: np.ndarray) -> None:
        """Note what the robot was told at a step; steps only grow."""
        self._history.append((step, row))

    @property
    def began(self) -> int | None:
        """The oldest step whose command is known; None if there is none."""
        return self._history[0][0] if self._history else None

    def in_force(self, step: int) -> np.ndarray:
        """What the robot was last told at or before a step; its first known command for a step before that."""
        return next((row for executed, row in reversed(self._history) if executed <= step), self._history[0][1])


def coast(frame: Frame, row: np.ndarray, before: np.ndarray, keep: float) -> np.ndarray:
    """The row (A,) after `row`, which came after `before`, when there is no action: with `keep` of the last motion.

    keep: 0 stands still (hold), below 1 decelerates. No motion is known if row is before: then it stands still.
    """
    after = frame.moved(row, keep * frame.difference(row, before)) if keep else row.copy()
    after[frame.zero_at_rest] = keep * row[frame.zero_at_rest]
    after[frame.held] = row[frame.held]
    return after
