"""What is measured of rollouts: success, distance, reaction, and how smoothly one chunk follows another.

Jumps are told in units of the most that a robot can change its velocity in one control step: 1 is as hard as it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

import numpy as np

from xr0_engine.lab.rollouts import Rollout
from xr0_engine.lab.tasks import CHUNK, PointTask

TOWARD = 0.3
"""Of the expert's speed: how much more toward its new disc an action goes that reacts. Any change of the picture
changes a policy's actions by a tenth; this a policy only does that means to go there."""


@dataclass(frozen=True)
class Measures:
    """Means over rollouts; None where a task has no such thing.

    success: share of rollouts. reached: share of events after which the goal was reached in time. distance: of a robot
    from its goal, over all steps. reaction_steps: from an event to the first executed action that goes toward the new
    goal, measured against the twin's, which never sees it; an event that nothing follows counts as a whole chunk.
    missed: share of those. floor_steps: until the first action whose chunk's observation could show the event: no
    policy reacts sooner. seam: change of the action where one chunk follows another. jerk: change of that change, over
    all steps. adherence: change from a call's last prefix action to its first own one. hit: share of rollouts that
    ran into the obstacle.
    """

    success: float
    reached: float | None
    distance: float
    reaction_steps: float | None
    reaction_median: float | None
    missed: float | None
    floor_steps: float | None
    seam: float | None
    jerk: float
    adherence: float | None
    hit: float | None


def measure(task: PointTask, rollouts: Sequence[Rollout], pairs: Sequence[tuple[Rollout, Rollout]] = ()) -> Measures:
    """pairs: rollouts and their twins, in which the first event that counts, and all later ones, never happen. Raises
    ValueError of no rollout."""
    if not rollouts:
        raise ValueError("rollouts: expected at least one")
    counted = [event for rollout in rollouts for event in rollout.events if event.counts]
    reactions = [reaction(task, rollout, twin) for rollout, twin in pairs]
    steps = [took for took, _ in reactions]
    return Measures(
        success=fmean(rollout.episode.success for rollout in rollouts),
        reached=fmean(event.reached is not None for event in counted) if counted else None,
        distance=fmean(float(distances(rollout).mean()) for rollout in rollouts),
        reaction_steps=fmean(steps) if steps else None,
        reaction_median=float(median(steps)) if steps else None,
        missed=fmean(is_missed for _, is_missed in reactions) if reactions else None,
        floor_steps=_mean([floor(rollout, twin) for rollout, twin in pairs]),
        seam=_mean([jump for rollout in rollouts for jump in changes(task, rollout)[rollout.seams]]),
        jerk=fmean(float(jerks(task, rollout).mean()) for rollout in rollouts),
        adherence=_mean([jump for rollout in rollouts for jump in continuations(task, rollout)]),
        hit=fmean(any(event.hit for event in rollout.events) for rollout in rollouts) if task.has_obstacles else None,
    )


def reaction(task: PointTask, rollout: Rollout, twin: Rollout) -> tuple[int, bool]:
    """(control steps, whether nothing followed), of the first event that the twin lacks."""
    event = rollout.events[len(twin.events)]
    end = min(event.step + CHUNK, event.end, len(rollout.actions), len(twin.actions))
    during = slice(event.step, end)
    apart = (rollout.actions[during] - twin.actions[during]).reshape(-1, task.robots, 2)
    way = rollout.goals[event.step] - rollout.positions[event.step]
    moved = np.linalg.norm(rollout.goals[event.step] - twin.goals[event.step], axis=-1) > 0
    toward = (apart * (way / np.linalg.norm(way, axis=-1, keepdims=True))).sum(-1)[:, moved]
    reacts = np.flatnonzero((toward > TOWARD * task.speed).any(-1))
    return (int(reacts[0]), False) if len(reacts) else (CHUNK, True)


def floor(rollout: Rollout, twin: Rollout) -> float:
    """Control steps from the first event that the twin lacks to the first executed action of a chunk that was inferred
    from what came after it; CHUNK if there is none within a chunk."""
    event = rollout.events[len(twin.events)]
    takeovers = [call.takeover for call in rollout.calls if call.observed_step >= event.step]
    return float(min((step - event.step for step in takeovers if step is not None), default=CHUNK))


def distances(rollout: Rollout) -> np.ndarray:
    """(N,) of the robots from their goals, their mean, after each step."""
    return np.asarray(np.linalg.norm(rollout.positions - rollout.goals, axis=-1).mean(-1)[1:])


def changes(task: PointTask, rollout: Rollout) -> np.ndarray:
    """(N,) of the action from each step to the next, 0 at the first."""
    steps = np.diff(rollout.actions, axis=0, prepend=rollout.actions[:1])
    return norms(task, steps) / task.acceleration


def jerks(task: PointTask, rollout: Rollout) -> np.ndarray:
    """(N - 2,) second differences."""
    return norms(task, np.diff(rollout.actions, 2, axis=0)) / task.acceleration


def continuations(task: PointTask, rollout: Rollout) -> list[float]:
    """From the last prefix action to the first own one, of each call with a prefix."""
    calls = [call for call in rollout.calls if 0 < call.prefix_length < len(call.chunk)]
    pairs = [call.chunk[call.prefix_length] - call.chunk[call.prefix_length - 1] for call in calls]
    return [float(norms(task, pair[None])[0]) / task.acceleration for pair in pairs]


def norms(task: PointTask, rows: np.ndarray) -> np.ndarray:
    """(N,) of (N, C): the robots' mean length of a row."""
    return np.asarray(np.linalg.norm(rows.reshape(len(rows), task.robots, 2), axis=-1).mean(-1))


def _mean(values: Sequence[float]) -> float | None:
    return float(fmean(values)) if values else None
