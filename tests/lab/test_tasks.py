"""The lab's tasks: schedules by seed, twins, the robots' limits, pictures that show where things are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from xr0_engine.lab.drawing import EDGE, GOALS, SIDE, draw
from xr0_engine.lab.tasks import MOST_LAG, REACHED, STRONGER, TASKS, PointEnv, find_task, schedule

EACH = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


@EACH
def test_an_episode_is_its_seeds_alone(task):
    first, second, other = (PointEnv(task) for _ in range(3))
    rng = np.random.default_rng(0)
    first.reset(seed=3)
    first.act(rng.uniform(-0.1, 0.1, 2 * task.robots))
    for env, seed in ((first, 3), (second, 3), (other, 4)):
        observation, _ = env.reset(seed=seed)
        env.told = [observation["image"].tobytes(), *(change.scene.goals.tobytes() for change in env.changes)]
    assert first.told == second.told != other.told
    assert first.horizon == second.horizon


@EACH
def test_discs_stand_long_enough_and_jump_far_enough(task):
    for seed in range(40):
        changes, horizon = schedule(task, seed, 2)
        ends = [change.step for change in changes[1:]] + [horizon]
        stands = [end - change.step for change, end in zip(changes, ends, strict=True)]
        assert [change.counts for change in changes].count(True) == 2
        for change, stood in zip(changes[1:], stands[1:], strict=True):
            assert task.stands[0] <= stood <= task.stands[1] if change.counts else stood < MOST_LAG + 5
        for before, after in pairwise(changes):
            moved = np.linalg.norm(after.scene.goals - before.scene.goals, axis=-1)
            assert moved.max() > 2 * REACHED


def test_a_twin_lacks_a_change_and_all_after_it():
    task = TASKS["chase-eight"]
    env, twin = PointEnv(task), PointEnv(task)
    env.reset(seed=5)
    event = env.changes[2].step
    twin.reset(seed=5, options={"jumps": 1})
    for step in range(env.horizon):
        same = np.array_equal(env.scene.goals, twin.scene.goals)
        assert same == (step < event), step
        env.act(np.zeros(2))
        twin.act(np.zeros(2))
    assert twin.horizon == env.horizon


def test_every_scene_is_of_a_kind_that_demonstrations_show():
    """Two ways have an obstacle from the first picture on, or a policy would begin in what it has never seen."""
    for task in TASKS.values():
        scenes = [change.scene for seed in range(20) for change in schedule(task, seed, 2)[0]]
        assert all((scene.obstacle is not None) == task.has_obstacles for scene in scenes)
        # None begins in it.
        for scene in (scene for scene in scenes if scene.obstacle is not None):
            assert np.linalg.norm(scene.goals[0] - scene.obstacle[:2]) > scene.obstacle[2] + REACHED


@EACH
def test_robots_keep_their_limits(task):
    env = PointEnv(task)
    env.reset(seed=0)
    before = env.velocities
    for command in np.random.default_rng(1).uniform(-1, 1, (50, 2 * task.robots)):
        env.act(command)
        assert np.abs(env.positions).max() <= 1.05
        inside = np.abs(env.positions).max(axis=-1) < 1.05
        change = np.linalg.norm(env.velocities - before, axis=-1)
        assert (change[inside] < STRONGER * task.acceleration + 1e-9).all()
        before = env.velocities


def test_gymnasiums_five():
    env = PointEnv(TASKS["two-ways"])
    env.reset(seed=0)
    for _ in range(env.horizon):
        observation, reward, terminated, truncated, info = env.step(np.zeros(2))
    assert observation["image"].shape == (SIDE, SIDE, 3)
    assert observation["state"].dtype == np.float32
    assert (terminated, truncated) == (False, True)
    assert reward == -info["distance"]


@pytest.mark.parametrize("place", [(-0.7, 0.7), (0.31, -0.5), (0.0, 0.0)])
def test_a_disc_is_drawn_where_it_is(place):
    image = draw(np.array([[0.9, 0.9]]), np.array([place])).astype(float)
    is_disc = np.abs(image - GOALS[0]).sum(-1) < 100
    rows, columns = np.nonzero(is_disc)
    scale = 2 * EDGE / SIDE
    found = (columns.mean() + 0.5) * scale - EDGE, EDGE - (rows.mean() + 0.5) * scale
    # A quarter of a pixel: edges are counted or not.
    assert np.allclose(found, place, atol=scale / 4)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="task: expected one of chase-four"):
        find_task("chase")
    env = PointEnv(TASKS["chase-four"])
    with pytest.raises(ValueError, match="events, jumps"):
        env.reset(options={"jumps": -1})
    env.reset()
    with pytest.raises(ValueError, match="action: expected 2 finite numbers"):
        env.act(np.array([0.0, np.nan]))
