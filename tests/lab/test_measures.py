"""What is measured of rollouts, on ones whose figures are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.evaluation.fake import an_episode
from xr0_engine.lab.benchmark import Event, PointBenchmark
from xr0_engine.lab.measures import TOWARD, measure, reaction
from xr0_engine.lab.rollouts import Call, Rollout, trials
from xr0_engine.lab.tasks import CHUNK, TASKS

TASK = TASKS["chase-eight"]
STEPS, JUMP = 40, 10


def rollout(actions: np.ndarray, jumps: bool = True, **changed: Any) -> Rollout:
    """A robot that stands at the origin on its disc, which jumps to (0, 1) at step JUMP. actions: what it is told."""
    goals = np.zeros((STEPS + 1, 1, 2))
    goals[JUMP:, 0, 1] = 1.0 if jumps else 0.0
    return Rollout(
        trial=trials(PointBenchmark("chase-eight"), 1, "sync", 0)[0],
        episode=an_episode(success=True),
        actions=actions,
        chunks=np.repeat([1, 2], STEPS // 2),
        indices=np.tile(np.arange(STEPS // 2), 2),
        positions=np.zeros((STEPS + 1, 1, 2)),
        velocities=np.zeros((STEPS + 1, 1, 2)),
        goals=goals,
        events=(Event(JUMP, True, STEPS, 30, False),) if jumps else (),
        calls=changed.pop("calls", ()),
    )


def test_a_reaction_goes_toward_the_new_disc() -> None:
    """Neither a small change nor one to the side is one; the first that is large enough is."""
    still = np.zeros((STEPS, 2))
    moving = still.copy()
    moving[JUMP + 1] = (0, 0.9 * TOWARD * TASK.speed)
    moving[JUMP + 2] = (TASK.speed, 0)
    moving[JUMP + 3] = (0, -TASK.speed)
    moving[JUMP + 5 :] = (0, 1.1 * TOWARD * TASK.speed)
    twin = rollout(still, jumps=False)
    assert reaction(TASK, rollout(moving), twin) == (5, False)
    # What the twin does too is none.
    assert reaction(TASK, rollout(moving), rollout(moving, jumps=False)) == (CHUNK, True)
    assert reaction(TASK, rollout(still), twin) == (CHUNK, True)


def test_only_the_robot_whose_disc_jumped_reacts() -> None:
    """Of two arms, what the other does is no reaction."""
    task = TASKS["chase-two"]
    one = rollout(np.zeros((STEPS, 2)))
    still = {name: np.repeat(getattr(one, name), 2, axis=1) for name in ("positions", "velocities", "goals")}
    # The second arm's disc stays, and is not where the arm is.
    still["goals"][:, 1] = (1.0, 0.0)
    actions = np.zeros((STEPS, 4))
    actions[JUMP + 2 :, 2] = task.speed
    actions[JUMP + 7 :, 1] = task.speed
    both = replace(one, actions=actions, **still)
    goals = still["goals"].copy()
    goals[:, 0] = 0.0
    twin = replace(both, actions=np.zeros((STEPS, 4)), goals=goals, events=())
    assert reaction(task, both, twin) == (7, False)


def test_a_reaction_after_a_chunk_is_a_miss() -> None:
    late = np.zeros((STEPS, 2))
    late[JUMP + CHUNK :] = (0, TASK.speed)
    assert reaction(TASK, rollout(late), rollout(np.zeros((STEPS, 2)), jumps=False)) == (CHUNK, True)


def test_measures() -> None:
    """By hand: one seam, of three times what a robot can change in a step; distance 1 from the jump on."""
    actions = np.zeros((STEPS, 2))
    actions[STEPS // 2 :, 0] = 3 * TASK.acceleration
    chunk = np.zeros((CHUNK, 2))
    chunk[4:, 1] = 0.5 * TASK.acceleration
    one = rollout(actions, calls=(Call(2, 16, 4, 20, chunk), Call(1, 0, 0, 0, chunk)))
    failed = replace(one, episode=an_episode(success=False), events=(Event(JUMP, True, STEPS, None, False),))
    found = measure(TASK, [one, failed], [(one, rollout(np.zeros((STEPS, 2)), jumps=False))])
    assert found.success == found.reached == 0.5
    assert found.seam == pytest.approx(3.0)
    assert found.adherence == pytest.approx(0.5)
    assert found.distance == pytest.approx((STEPS - JUMP + 1) / STEPS)
    assert found.jerk == pytest.approx(2 * 3.0 / (STEPS - 2))
    assert (found.reaction_steps, found.missed, found.hit) == (CHUNK, 1.0, None)
    # The jump is at 10, what is inferred after it begins at 20.
    assert found.floor_steps == 10
    with pytest.raises(ValueError, match="rollouts"):
        measure(TASK, [])
