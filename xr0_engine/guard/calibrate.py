"""Profile and thresholds from recordings: every episode is scored by a profile of the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from xr0_engine.guard.profile import MOST_INSTRUCTIONS, Following, RobotProfile, ViewProfile, plain
from xr0_engine.guard.watch import AT_ONCE, YES_OR_NO, Planned, Seen, Watch, waits

FOLDS = 5
FEWEST_EPISODES, ENOUGH_RUNS = 8, 100
"""Whose highest scores tell how they scatter; and runs of the policy from which on they tell it well enough for about
as many false alarms as were asked for (docs/guard.md)."""
UPPERMOST, FEWEST_ABOVE, FARTHEST = 0.2, 5, 1e3
"""The part of the highest scores whose mean says how the tail falls, at the least so many; and how far it may be gone
beyond the largest."""
FOLLOWS = 0.35
"""A state column follows the plan if it is nearer to it than this part of how far it has gone (root mean squares)."""
ERROR_QUANTILE, LEAST_ERROR = 0.99, 0.01
"""Of how far states are from where they were sent, in parts of their range."""
ASPECT_DECIMALS = 3
STILL = 0.05
"""What a state column that stands still is measured by, in parts of the median column's range."""

LEAST = {
    "brightness": 0.1,
    "contrast": 0.1,
    "unlike": 0.5,
    "turned": 1.0,
    "swapped": 1.0,
    "frozen": 0.05,
    "state range": 0.02,
    "state jump": 1.2,
    "state frozen": 2.0,
    "state astray": 1.5,
    "bend": 0.0,
    "disagreement": 0.0,
}
"""The least threshold of a score, where recordings are all alike: a tenth of the range; nearer to another picture than
to its own; a twentieth of the state's range gone; two levels of all pixels; see watch.py for what they count."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """An episode at the moments at which a policy would look. seen: one after the other. targets: of each, the (T, A)
    actions that were recorded from there on. chunks: of each, the policy's, None without one. fastest: (S,) the
    fastest change per second from one control step to the next. instructions: all wordings. is_run: the policy drove,
    and the targets are its chunks'."""

    seen: Sequence[Seen]
    targets: Sequence[np.ndarray]
    chunks: Sequence[Planned] | None
    fastest: np.ndarray
    instructions: tuple[str, ...]
    is_run: bool = False


@dataclass(frozen=True)
class Robot:
    """What is known of the robot before anything is measured; views with 0 for what is not. As in RobotProfile."""

    robot_type: str
    control_rate_hz: float
    action_width: int
    layout: str
    views: tuple[ViewProfile, ...]
    statistics: str | None = None


def calibrate(robot: Robot, episodes: Sequence[Recorded], alarms_per_hour: float) -> RobotProfile:
    """The profile of all episodes. Thresholds: each episode's highest scores by a profile of the others, FOLDS parts in
    turn; the tail of these says which score is passed so seldom that all scores together give so many false alarms an
    hour; never below the highest that there was. Where there are enough runs of the policy itself they alone say it: it
    moves otherwise than who showed it how.

    Raises ValueError for fewer than FEWEST_EPISODES, for those of several robots or of a moment, or an alarm rate that
    is none.
    """
    if len(episodes) < FEWEST_EPISODES:
        raise ValueError(
            f"recordings: expected at least {FEWEST_EPISODES} episodes, whose highest scores tell how they scatter, "
            f"got {len(episodes)}: record more"
        )
    if not 0 < alarms_per_hour < math.inf:
        raise ValueError(f"alarms_per_hour: expected a number above 0, got {alarms_per_hour:g}")
    widths = sorted({len(seen.state) for episode in episodes for seen in episode.seen})
    if len(widths) > 1:
        told = ", ".join(map(str, widths))
        raise ValueError(f"recordings, runs: expected states of as many columns in all, got {told}")
    runs = [episode for episode in episodes if episode.is_run]
    telling = runs if len(runs) >= FEWEST_EPISODES else episodes
    hours = sum(episode.seen[-1].time_s - episode.seen[0].time_s for episode in telling) / 3600
    if not hours > 0:
        raise ValueError("recordings: expected episodes that are looked at more than once: record longer ones")
    maxima: dict[str, list[float]] = {}
    for fold in range(FOLDS):
        own = episodes[fold::FOLDS]
        others = [episode for place, episode in enumerate(episodes) if place % FOLDS != fold]
        held_out = profile_of(robot, others)
        for episode in own:
            if len(runs) >= FEWEST_EPISODES and not episode.is_run:
                continue
            for name, value in highest(held_out, episode).items():
                maxima.setdefault(name, []).append(value)
    chance = min(alarms_per_hour * hours / len(telling) / len(maxima), 0.5)
    thresholds = {name: threshold(name, np.array(values), chance) for name, values in sorted(maxima.items())}
    facts = {
        "episodes": len(episodes) - len(runs),
        "runs": len(runs),
        "thresholds_of": len(telling),
        "hours": float(f"{hours:.4g}"),
        "alarms_per_hour": alarms_per_hour,
    }
    return replace(profile_of(robot, episodes), thresholds=thresholds, facts=facts)


def threshold(name: str, maxima: np.ndarray, chance: float) -> float:
    """The score that an episode's highest passes with that chance. maxima: (episodes,) the highest of each.

    Beyond the largest the tail is an extrapolation: the larger of two, both exact where it falls exponentially, neither
    below the largest. One goes on from the median to the largest and beyond, so far that the largest may be a small one
    of its kind; the other goes by the mean of the uppermost fifth.
    """
    count, middle, largest = len(maxima), float(np.median(maxima)), float(maxima.max())
    by_largest = middle + max(1.0, _reach(count, chance)) * (largest - middle)
    # What is above the border, of whose mean a few say little.
    above = min(max(FEWEST_ABOVE, round(UPPERMOST * count)), count - 1)
    border, *top = np.sort(maxima)[-above - 1 :].tolist()
    excess = sum(top) / above - border
    by_mean = border + above * excess * (max(1.0, above / count / chance) ** (1 / above) - 1)
    # The check of a view has the view's key after its name.
    least = next(value for check, value in LEAST.items() if name == check or name.startswith(f"{check} "))
    # Rounded up: the highest there was must not be above.
    return float(f"{max(by_largest, by_mean, largest, least) * (1 + 1e-5):.6g}")


def _reach(count: int, chance: float) -> float:
    """How many times the way from the median to the largest of so many one more of them passes with a chance.

    Half of them are beyond the median, n of them; were their excesses exponential, of mean 1, the largest M of them
    would be passed k times over with the chance E[exp(-k M)] / 2 = n! k! / (n + k)! / 2.
    """
    n, low, high = count / 2, 0.0, FARTHEST
    for _ in range(60):
        k = (low + high) / 2
        passed = math.lgamma(n + 1) + math.lgamma(k + 1) - math.lgamma(n + k + 1)
        low, high = (k, high) if passed > math.log(2 * chance) else (low, k)
    return high


def highest(profile: RobotProfile, episode: Recorded) -> dict[str, float]:
    """Name -> the highest score of an episode, as the guard counts: of what must be seen twice the lower of two in
    turn, or the part of a single one that is as much. What is known or not, as a sentence, has none."""
    rows: dict[str, list[float]] = {}
    for name, value in scores(profile, episode):
        if name.split()[0] not in YES_OR_NO:
            rows.setdefault(name, []).append(value)
    found = {}
    for name, values in rows.items():
        found[name] = max(values)
        if waits(name):
            found[name] = max(found[name] / AT_ONCE, *map(min, pairwise(values)), -math.inf)
    return found


def scores(profile: RobotProfile, episode: Recorded) -> Iterator[tuple[str, float]]:
    if episode.is_run:
        watch = Watch(profile)
        for seen, chunk in zip(episode.seen, episode.chunks or (), strict=True):
            live = watch.see(seen) | watch.plan(chunk)
            yield from ((name, value) for name, (value, _) in live.items())
        return
    # The recorded robot followed the recorded targets; the policy's chunks were executed by nobody.
    of_states, of_policy = Watch(profile), Watch(profile)
    for place, seen in enumerate(episode.seen):
        found: dict[str, Any] = of_states.see(seen)
        of_states.plan(Planned(episode.targets[place]))
        if episode.chunks is not None:
            of_policy.see(seen)
            found = found | of_policy.plan(episode.chunks[place])
        yield from ((name, value) for name, (value, _) in found.items())


def profile_of(robot: Robot, episodes: Sequence[Recorded]) -> RobotProfile:
    """Without thresholds."""
    states = np.concatenate([[seen.state for seen in episode.seen] for episode in episodes])
    low, high = states.min(axis=0), states.max(axis=0)
    moving = (high - low)[high > low]
    least = STILL * float(np.median(moving)) if len(moving) else 1.0
    scale = np.maximum(high - low, least)
    fastest = np.max([episode.fastest for episode in episodes], axis=0)
    wordings = {plain(words) for episode in episodes for words in episode.instructions}
    return RobotProfile(
        robot_type=robot.robot_type,
        control_rate_hz=robot.control_rate_hz,
        action_width=robot.action_width,
        layout=robot.layout,
        views=tuple(_view(view, episodes) for view in robot.views),
        low=low,
        high=high,
        scale=scale,
        # Of a column that never moved, what a still one is measured by in a second.
        speed=np.maximum(fastest, least),
        instructions=tuple(sorted(wordings)) if len(wordings) <= MOST_INSTRUCTIONS else None,
        following=_following(robot, episodes, scale),
        thresholds={},
        statistics=robot.statistics,
    )


def _view(view: ViewProfile, episodes: Sequence[Recorded]) -> ViewProfile:
    looks = [seen.looks[view.key] for episode in episodes for seen in episode.seen]
    brightness, contrast = ([getattr(look, name) for look in looks] for name in ("brightness", "contrast"))
    thumbnails = np.stack([look.thumbnail for look in looks])
    return replace(
        view,
        brightness=(min(brightness), max(brightness)),
        contrast=(min(contrast), max(contrast)),
        mean=thumbnails.mean(axis=0),
        std=thumbnails.std(axis=0),
        aspects=tuple(sorted({round(look.aspect, ASPECT_DECIMALS) for look in looks if look.aspect is not None})),
    )


def _following(robot: Robot, episodes: Sequence[Recorded], scale: np.ndarray) -> Following | None:
    """The state columns that go where the action column of the same number says, from where they are or altogether."""
    steps = [step for episode in episodes for step in _steps(robot.control_rate_hz, episode)]
    if not steps:
        return None
    before, target, after = (np.stack(rows) for rows in zip(*steps, strict=True))
    gone = _size(after - before)
    errors: Mapping[bool, np.ndarray] = {True: before + target - after, False: target - after}
    columns, relative, error = [], [], []
    for column in range(target.shape[1]):
        how = min(errors, key=lambda way: _size(errors[way])[column])
        off = errors[how][:, column]
        if gone[column] > 0 and _size(errors[how])[column] < FOLLOWS * gone[column]:
            columns.append(column)
            relative.append(how)
            error.append(max(float(np.quantile(np.abs(off), ERROR_QUANTILE)), LEAST_ERROR * scale[column]))
    return Following(np.array(columns), np.array(relative), np.array(error)) if columns else None


def _steps(rate_hz: float, episode: Recorded) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """State, what it was told until the next observation, and the state then; columns that both have."""
    pairs = zip(episode.seen[:-1], episode.targets[:-1], episode.seen[1:], strict=True)
    for seen, targets, after in pairs:
        steps = round((after.time_s - seen.time_s) * rate_hz)
        width = min(len(seen.state), targets.shape[1])
        if 0 < steps <= len(targets):
            yield seen.state[:width], targets[steps - 1, :width], after.state[:width]


def _size(values: np.ndarray) -> np.ndarray:
    root: np.ndarray = np.sqrt(np.square(values).mean(axis=0))
    return root
