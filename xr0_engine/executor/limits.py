"""Limits of each column, applied to every command and counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from xr0_engine.robot.layouts import Frame


@dataclass(frozen=True, eq=False)
class Limits:
    """Bounds of a robot's commands: (A,) each, infinite where a column has none.

    low, high: where a column may stand. velocity: how much it may change per second. jump: how much it may change from
    one command to the next, whatever time passed between them. For rotations, change is the turn about each axis; a
    column with nothing between its values (Frame.held) has neither velocity nor jump.
    Raises ValueError for shapes that differ, NaN, low above high, or a velocity or jump that is not above 0.
    """

    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    jump: np.ndarray

    def __post_init__(self) -> None:
        for name in ("low", "high", "velocity", "jump"):
            value = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, value)
            if value.ndim != 1 or value.shape != self.low.shape or np.isnan(value).any():
                raise ValueError(f"{name}: expected {self.low.shape} numbers, got {value}")
        if (self.low > self.high).any():
            raise ValueError(f"low: expected at most high, got more in columns {np.flatnonzero(self.low > self.high)}")
        for name in ("velocity", "jump"):
            if not (getattr(self, name) > 0).all():
                raise ValueError(f"{name}: expected values above 0, got {getattr(self, name)}")

    @staticmethod
    def none(width: int) -> Limits:
        """No limits."""
        infinite = np.full(width, np.inf)
        return Limits(-infinite, infinite, infinite, infinite)


class Limiter:
    """Applies limits one command after the other. clipped: how many commands each kind of limit changed.

    Raises ValueError if the limits do not fit the frame: another width, a position limit on a rotation, or a limit of
    velocity or jump on a column that has nothing between its values.
    """

    def __init__(self, limits: Limits, frame: Frame) -> None:
        if limits.low.shape != (frame.width,):
            raise ValueError(f"limits: expected {frame.width} columns, got {limits.low.shape[0]}")
        if np.isfinite(limits.low[frame.angular]).any() or np.isfinite(limits.high[frame.angular]).any():
            raise ValueError("limits: expected no position limit on a rotation column (an axis-angle has no range)")
        for name in ("velocity", "jump"):
            if np.isfinite(getattr(limits, name)[frame.held]).any():
                raise ValueError(f"limits: expected no {name} limit on a column of held_columns, which has two values")
        self.clipped: Counter[str] = Counter()
        self._limits = limits
        self._frame = frame
        self._limits_change = bool(np.isfinite([limits.velocity, limits.jump]).any())
        self._last: tuple[np.ndarray, float] | None = None

    def start(self, row: np.ndarray, time_s: float) -> None:
        """The robot stands at row: the first command is measured from there."""
        self._last = row, time_s

    def clock_jumped(self, time_s: float) -> None:
        """The last command counts as given at time_s of the clock as it is now."""
        if self._last is not None:
            self._last = self._last[0], time_s

    def __call__(self, row: np.ndarray, time_s: float) -> tuple[np.ndarray, list[str]]:
        """The command (A,) nearest to row that the limits allow, and the kinds of limit that changed it.

        time_s: when the command is due, later than that of the last one.
        """
        if self._last is None:
            command, clipped = self.allowed(row, row, np.inf)
        else:
            command, clipped = self.allowed(row, self._last[0], time_s - self._last[1])
        self._last = command, time_s
        self.clipped.update(clipped)
        return command, clipped

    def allowed(
        self, row: np.ndarray, last: np.ndarray, seconds: float, commands: int = 1
    ) -> tuple[np.ndarray, list[str]]:
        """The same for the last of some commands, that together take so long, without counting it."""
        limits = self._limits
        command = np.clip(row, limits.low, limits.high)
        clipped = [] if np.array_equal(command, row) else ["position"]
        if self._limits_change:
            change = self._frame.difference(command, last)
            for kind, bound in (("velocity", limits.velocity * seconds), ("jump", limits.jump * commands)):
                bounded = np.clip(change, -bound, bound)
                if not np.array_equal(bounded, change):
                    clipped.append(kind)
                    change = bounded
                    command = self._frame.moved(last, change)
        return command, clipped
