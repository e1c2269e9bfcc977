"""How long it takes from an observation to its chunk, as an estimate to plan with."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 20
WARM_UP = 1
# A delay this many times the window's median is an accident, not what to expect. Should it become the rule, the median
# follows within half a window.
OUTLIER_RATIO = 3.0
# Rounding of times may not turn a delay of exactly 3 steps into 4.
ROUNDING_STEPS = 1e-6


class DelayEstimator:
    """The longest recent delay, outliers and the first WARM_UP chunks left out.

    expected_s: what to plan with before anything was measured; None if nobody knows.
    """

    def __init__(self, expected_s: float | None = None) -> None:
        self.seconds = expected_s
        """None before the first measurement, if nothing was expected either."""
        self._warm_up = WARM_UP
        self._window: deque[float] = deque(maxlen=WINDOW)

    def add(self, delay_s: float) -> None:
        if self._warm_up:
            self._warm_up -= 1
            return
        self._window.append(delay_s)
        # Here, not where it is asked for: that is at every tick.
        most = OUTLIER_RATIO * statistics.median(self._window)
        self.seconds = max(delay for delay in self._window if delay <= most)

    def steps(self, rate_hz: float) -> int | None:
        """The estimate in whole steps, rounded up."""
        return None if self.seconds is None else delay_steps(self.seconds, rate_hz)


def delay_steps(delay_s: float, rate_hz: float) -> int:
    """The number of actions that are executed during a delay: 80 ms at 30 Hz are 2.4, so 3."""
    return max(0, math.ceil(delay_s * rate_hz - ROUNDING_STEPS))
