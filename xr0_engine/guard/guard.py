"""The guard of one robot: scores against thresholds, warnings counted once as long as they last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from xr0_engine.guard.profile import RobotProfile
from xr0_engine.guard.watch import AT_ONCE, MISFIT, YES_OR_NO, Eyes, Planned, Scores, Seen, Watch, misfits, waits
from xr0_engine.types import ActionChunk, GuardWarning, Observation, TokenizedObservation

CALM = 3
"""Scores in turn below the threshold after which a warning is over: one that flickers is one."""


class Guard:
    """Observations and chunks in, warnings out. One robot, one run; make a new one for each.

    counts: name -> warnings so far. A warning lasts from the score that begins it until three in turn are not above the
    threshold; only its begin is returned, and counted. time_s: of the last observation. keep: called with all that is
    looked at, to be recorded.
    """

    def __init__(self, robot: RobotProfile, keep: Callable[[Seen | Planned], None] | None = None) -> None:
        self.robot, self._keep = robot, keep
        self.counts: Counter[str] = Counter()
        self._eyes, self._watch = Eyes(robot.views), Watch(robot)
        # Name -> how many scores in turn were calm since its warning.
        self._lasting: dict[str, int] = {}
        # Names whose last score was above the threshold.
        self._above: set[str] = set()
        self.time_s = 0.0
        self._sees = False

    def see(self, observation: Observation | TokenizedObservation, time_s: float) -> list[GuardWarning]:
        """time_s: of the observation, on a clock that goes on."""
        self.time_s = time_s
        seen = self._eyes.see(observation, time_s)
        faults = "; ".join(misfits(seen, self.robot))
        self._sees = not faults
        scores: Scores = {MISFIT: (float(bool(faults)), faults)}
        if not faults:
            scores.update(self._watch.see(seen))
            if self._keep is not None:
                self._keep(seen)
        return self._warnings(scores)

    def plan(self, chunk: ActionChunk) -> list[GuardWarning]:
        """The chunk of the last observation."""
        if not self._sees or chunk.actions.shape[1] != self.robot.action_width:
            return []
        planned = Planned(chunk.actions, chunk.prefix_length, chunk.bend)
        if self._keep is not None:
            self._keep(planned)
        return self._warnings(self._watch.plan(planned))

    def forget(self) -> None:
        """Something in between was not handed over: the last chunk is not what the robot follows now."""
        self._watch.forget()

    def _warnings(self, scores: Scores) -> list[GuardWarning]:
        found = []
        for name, (value, detail) in scores.items():
            threshold = 0.5 if name.split()[0] in YES_OR_NO else self.robot.thresholds.get(name, math.inf)
            was_above = name in self._above
            self._above.discard(name)
            if value > threshold:
                self._above.add(name)
                begins = not waits(name) or was_above or value > AT_ONCE * threshold
                if name in self._lasting:
                    self._lasting[name] = 0
                elif begins:
                    self.counts[name] += 1
                    found.append(GuardWarning(name, value, threshold, detail, self.time_s))
                    self._lasting[name] = 0
            elif name in self._lasting:
                self._lasting[name] += 1
                if self._lasting[name] == CALM:
                    del self._lasting[name]
        return found
