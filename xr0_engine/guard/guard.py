"""The guard of one robot: scores against thresholds, warnings counted once as long as they last."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from xr0_engine.guard.profile import RobotProfile
from xr0_engine.guard.watch import Eyes, Planned, Scores, Seen, Watch, misfits
from xr0_engine.types import ActionChunk, GuardWarning, Observation, TokenizedObservation

CALM = 3
"""Scores in turn below the threshold after which a warning is over: one that flickers is one."""
MISFIT = "misfit"
YES_OR_NO = (MISFIT, "instruction", "shape")
"""Checks whose score is 0 or 1."""


class Guard:
    """Observations and chunks in, warnings out. One robot, one run; make a new one for each.

    counts: name -> warnings so far. A warning lasts from the score that passes its threshold until three in turn have
    not; only its begin is returned, and counted. keep: called with all that is looked at, to be recorded.
    """

    def __init__(self, robot: RobotProfile, keep: Callable[[Seen | Planned], None] | None = None) -> None:
        self.robot, self._keep = robot, keep
        self.counts: Counter[str] = Counter()
        self._eyes, self._watch = Eyes(robot.views), Watch(robot)
        # Name -> how many scores in turn were calm since its warning.
        self._lasting: dict[str, int] = {}
        self._time_s = math.nan
        self._sees = False

    def see(self, observation: Observation | TokenizedObservation, time_s: float) -> list[GuardWarning]:
        """time_s: of the observation, on a clock that goes on."""
        if isinstance(observation, TokenizedObservation):
            # Its pictures are patches by now, its words are tokens.
            observation = Observation({}, "", observation.state)
            seen = self._eyes.see(observation, time_s)
            seen = Seen(seen.time_s, {}, seen.state, None)
        else:
            seen = self._eyes.see(observation, time_s)
        self._time_s = time_s
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

    def _warnings(self, scores: Scores) -> list[GuardWarning]:
        found = []
        for name, (value, detail) in scores.items():
            threshold = 0.5 if name.split()[0] in YES_OR_NO else self.robot.thresholds.get(name, math.inf)
            if value > threshold:
                if name not in self._lasting:
                    self.counts[name] += 1
                    found.append(GuardWarning(name, value, threshold, detail, self._time_s))
                self._lasting[name] = 0
            elif name in self._lasting:
                self._lasting[name] += 1
                if self._lasting[name] == CALM:
                    del self._lasting[name]
        return found
