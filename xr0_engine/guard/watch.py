"""What is checked: one robot's observations and chunks in turn, each as scores beside its training data's.

A score is a number and the words for it; the higher, the stranger. What a camera shows, per view:

- `brightness`, `contrast`: how far beyond the range in training, in parts of that range.
- `unlike`: distance of the thumbnail from the mean one, in standard deviations.
- `turned`, `swapped`: that distance over the turned picture's, or to another view's mean; above 1 these fit better.
- `frozen`: how far the state has gone, in parts of its range, since the picture last changed.
- `shape`: 1 if its frames were never as wide for their height. `unseen`: 1 if there was nothing to look at.

What the robot feels, the strangest column counts:

- `state range`: how far beyond the range in training, in parts of it. `state jump`: speed over the fastest in training.
- `state frozen`: how much the pictures have changed, in levels, since the state last did.
- `state astray`: how far it is from every place that the last chunk planned for it, over how far that was in training.

And `instruction`: 1 if it was never seen. What the policy says of itself: `bend` of its flow, and `disagreement` of two
chunks in turn about the time that both plan for, in parts of the state's range.

What lasts must be above its threshold in two looks in turn, or twice as high in one: single looks stray far, in the
policy's own words most of all, and a fault that stays is there at the next look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from xr0_engine.guard.looks import TURNS, Eye, Look, is_frame
from xr0_engine.guard.profile import RobotProfile, ViewProfile, plain
from xr0_engine.robot.history import newest
from xr0_engine.types import Observation, TokenizedObservation

FORGET_S, FORGET_CHUNKS = 2.0, 1.5
"""Observations further apart, and by more than so many chunks, say nothing of each other's motion: between them an
episode may have ended."""
MISFIT = "misfit"
YES_OR_NO = (MISFIT, "instruction", "shape", "unseen")
"""Checks whose score is 0 or 1."""
SUDDEN = (*YES_OR_NO, "frozen", "state frozen", "state jump")
"""Checks that look back by themselves, or are certain, or see what is over by the next look."""
AT_ONCE = 2.0
"""Times the threshold: what need not be seen again."""
SAME_STATE = 1e-7
"""Parts of a column's range. Encoders do not repeat themselves to the last digit."""
CELL_STD = 0.15
"""The least standard deviation of a thumbnail's cell, in its own: what one pixel more or less of an edge makes."""
SAME_ASPECT = 0.02
"""Of width over height: what a row or column more makes of small frames."""
LEAST_OVERLAP = 3
"""Actions that two chunks must both plan to be compared."""

Scores = dict[str, tuple[float, str]]
"""Name -> value, and what it says in words."""


@dataclass(frozen=True, eq=False)
class Seen:
    """An observation as a guard keeps it. looks: of each view that could be looked at. state: (S,). has_pictures: False
    of one that came as tokens and patches."""

    time_s: float
    looks: Mapping[str, Look]
    state: np.ndarray
    instruction: str | None
    has_pictures: bool = True


@dataclass(frozen=True, eq=False)
class Planned:
    """A chunk. actions: (T, A), robot units. given: how many of the first were not the policy's choice."""

    actions: np.ndarray
    given: int = 0
    bend: float | None = None


class Eyes:
    """Looks at all views of one robot."""

    def __init__(self, views: tuple[ViewProfile, ...]) -> None:
        self._eyes = {view.key: Eye(view.rotate_180, view.center_crop) for view in views}

    def see(self, observation: Observation | TokenizedObservation, time_s: float) -> Seen:
        rows = np.atleast_2d(np.asarray(observation.state, np.float64))
        state = rows.reshape(-1, rows.shape[-1])[-1] if rows.size else rows.reshape(-1)
        if isinstance(observation, TokenizedObservation):
            return Seen(time_s, {}, state, None, has_pictures=False)
        arrays = {key: newest(image) for key, image in observation.images.items() if isinstance(image, np.ndarray)}
        looks = {
            key: eye.look(arrays[key], observation.prepared)
            for key, eye in self._eyes.items()
            if key in arrays and is_frame(arrays[key])
        }
        return Seen(time_s, looks, state, observation.instruction)


class Watch:
    """Follows one robot from its first observation on: `see` each, and `plan` the chunk that it led to, if any."""

    def __init__(self, robot: RobotProfile) -> None:
        self._robot = robot
        self._instructions = None if robot.instructions is None else set(robot.instructions)
        self._before: Seen | None = None
        # The last chunk with the observation that it is of.
        self._planned: tuple[Seen, Planned] | None = None
        self._gone: dict[str, float] = {}
        self._changed = 0.0
        self._forget_s = FORGET_S

    def see(self, seen: Seen) -> Scores:
        scores: Scores = {}
        before = self._before
        for view in self._robot.views:
            if (look := seen.looks.get(view.key)) is not None:
                scores.update(self._of_view(view, look, self._gone_since(view.key, look, seen)))
            if seen.has_pictures:
                detail = "there is no picture of it, or none that is (H, W, 3) uint8, as files are not"
                scores[f"unseen {view.key}"] = float(look is None), detail
        scores["state range"] = self._range(seen.state)
        if self._instructions is not None and seen.instruction is not None:
            known = plain(seen.instruction) in self._instructions
            scores["instruction"] = float(not known), f"{seen.instruction!r:.80} is in no recording"
        if before is not None:
            scores["state frozen"] = self._frozen(before, seen)
            elapsed_s = seen.time_s - before.time_s
            if 0 < elapsed_s <= self._forget_s:
                scores["state jump"] = self._jump(before.state, seen.state, elapsed_s)
        astray = self._astray(seen)
        if astray is not None:
            scores["state astray"] = astray
        self._before = seen
        return scores

    def plan(self, planned: Planned) -> Scores:
        """The chunk of the observation that was seen last."""
        assert self._before is not None
        scores: Scores = {}
        if planned.bend is not None:
            scores["bend"] = planned.bend, "the flow's velocities differ more from each other than on recordings"
        disagreement = self._disagreement(self._before, planned)
        if disagreement is not None:
            scores["disagreement"] = disagreement
        self._planned = self._before, planned
        chunk_s = len(planned.actions) / self._robot.control_rate_hz
        self._forget_s = max(FORGET_S, FORGET_CHUNKS * chunk_s)
        return scores

    def forget(self) -> None:
        """The last chunk is not what the robot follows."""
        self._planned = None

    def _of_view(self, view: ViewProfile, look: Look, gone: float) -> Scores:
        fits = _distance(look.thumbnail, view)
        turns = {how: _distance(turn(look.thumbnail), view) for how, turn in TURNS.items()}
        how = min(turns, key=lambda turn: turns[turn])
        others = {other.key: _distance(look.thumbnail, other) for other in self._robot.views if other.key != view.key}
        scores = {
            "brightness": _beyond("brightness", look.brightness, view.brightness),
            "contrast": _beyond("contrast", look.contrast, view.contrast),
            "unlike": (fits, "the picture is not laid out as in training"),
            "turned": (fits / turns[how], f"the picture looks {how}"),
            "frozen": (gone, f"the picture stays the same while the state goes {gone:.0%} of its range"),
        }
        if look.aspect is not None and view.aspects:
            strange = min(abs(look.aspect / aspect - 1) for aspect in view.aspects) > SAME_ASPECT
            known = " or ".join(f"{aspect:.3g}" for aspect in view.aspects)
            scores["shape"] = float(strange), f"width over height is {look.aspect:.3g}, in training {known}"
        if others:
            other = min(others, key=lambda key: others[key])
            scores["swapped"] = fits / others[other], f"the picture looks like {other}"
        return {f"{name} {view.key}": score for name, score in scores.items()}

    def _gone_since(self, key: str, look: Look, seen: Seen) -> float:
        before = self._before
        if before is None or look.change is None or look.change > 0:
            self._gone[key] = 0.0
        elif before.state.shape == seen.state.shape:
            self._gone[key] = self._gone.get(key, 0.0) + float(self._parts(seen.state - before.state).max())
        return self._gone[key]

    def _frozen(self, before: Seen, seen: Seen) -> tuple[float, str]:
        changes = [look.change for look in seen.looks.values() if look.change is not None]
        if self._parts(seen.state - before.state).max() > SAME_STATE:
            self._changed = 0.0
        elif changes:
            self._changed += max(changes)
        return self._changed, "the state stays the same, to the last digit, while the pictures change"

    def _range(self, state: np.ndarray) -> tuple[float, str]:
        robot = self._robot
        beyond = np.maximum(robot.low - state, state - robot.high) / robot.scale
        column = int(beyond.argmax())
        low, high = robot.low[column], robot.high[column]
        return float(beyond[column]), f"column {column} is {state[column]:.4g}, in training {low:.4g} to {high:.4g}"

    def _jump(self, before: np.ndarray, state: np.ndarray, elapsed_s: float) -> tuple[float, str]:
        speeds = np.abs(state - before) / elapsed_s
        column = int((speeds / self._robot.speed).argmax())
        fastest = self._robot.speed[column]
        detail = f"column {column} changes by {speeds[column]:.4g} a second, in training by {fastest:.4g} at most"
        return float(speeds[column] / fastest), detail

    def _astray(self, seen: Seen) -> tuple[float, str] | None:
        following = self._robot.following
        if following is None or self._planned is None:
            return None
        origin, planned = self._planned
        if not 0 < seen.time_s - origin.time_s <= self._forget_s:
            return None
        columns = following.columns
        # Anywhere on its way, and at its start: an executor may have waited, or gone on with the chunk before.
        path = np.concatenate([origin.state[None, columns], self._path(origin, planned)])
        off = np.abs(path - seen.state[columns]) / following.error
        place = int(off.max(axis=1).argmin())
        column = int(off[place].argmax())
        target = path[place, column]
        detail = f"column {columns[column]} is {seen.state[columns[column]]:.4g}, the last chunk planned {target:.4g}"
        return float(off[place, column]), detail

    def _disagreement(self, seen: Seen, planned: Planned) -> tuple[float, str] | None:
        following = self._robot.following
        if following is None or self._planned is None:
            return None
        origin, before = self._planned
        elapsed_s = seen.time_s - origin.time_s
        if not 0 < elapsed_s <= self._forget_s:
            return None
        old, new = self._path(origin, before), self._path(seen, planned)
        scale = self._robot.scale[following.columns]
        most = round(elapsed_s * self._robot.control_rate_hz)
        # By how many steps they are apart follows from the time, unless the robot waited meanwhile.
        apart = [
            float(np.sqrt((((old[by + planned.given :] - new[planned.given : len(old) - by]) / scale) ** 2).mean()))
            for by in range(min(most, len(old) - planned.given - LEAST_OVERLAP) + 1)
            if len(old) == len(new)
        ]
        if not apart:
            return None
        return min(apart), "two chunks in turn plan different ways for the same time"

    def _path(self, origin: Seen, planned: Planned) -> np.ndarray:
        """(T, columns): where a chunk's actions send the state columns that follow it."""
        following = self._robot.following
        assert following is not None
        path: np.ndarray = planned.actions[:, following.columns] + np.where(
            following.relative, origin.state[following.columns], 0.0
        )
        return path

    def _parts(self, change: np.ndarray) -> np.ndarray:
        """Of each column's range."""
        parts: np.ndarray = np.abs(change) / self._robot.scale
        return parts


def waits(name: str) -> bool:
    """Whether a score must be above its threshold in two looks in turn."""
    return not any(name == check or name.startswith(f"{check} ") for check in SUDDEN)


def misfits(seen: Seen, robot: RobotProfile) -> Iterator[str]:
    """What makes an observation none of the profile's robot."""
    if seen.state.shape != robot.low.shape:
        yield f"the state has {len(seen.state)} columns, in training {len(robot.low)}"
    if not np.isfinite(seen.state).all():
        yield "the state has NaN or infinity"


def _beyond(what: str, value: float, known: tuple[float, float]) -> tuple[float, str]:
    low, high = known
    scale = max(high - low, 1.0)
    detail = f"{what} is {value:.0f} of 255, in training {low:.0f} to {high:.0f}"
    return max(low - value, value - high) / scale, detail


def _distance(thumbnail: np.ndarray, view: ViewProfile) -> float:
    return float(np.sqrt(np.square((thumbnail - view.mean) / (view.std + CELL_STD)).mean())) + 1e-6
