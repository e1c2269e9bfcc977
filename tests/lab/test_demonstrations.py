"""Demonstrations: the picture is never older than what the labels react to, and windows are the engine's own inputs."""

from __future__ import annotations

import numpy as np
import pytest

from xr0_engine.lab import robots
from xr0_engine.lab.demonstrations import DATASETS, Demonstrations, demonstrate
from xr0_engine.lab.tasks import CHUNK, MOST_LAG, REACHED, TASKS, PointEnv, Scene, move
from xr0_engine.robot.decode import recover
from xr0_engine.training.data.motion import BimanualMotion
from xr0_engine.training.data.windows import Windows

EACH = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
EPISODES = 60


@EACH
def test_every_episode_ends_at_its_disc(task):
    paths = demonstrate(task, EPISODES, 1)
    left = np.linalg.norm(paths.positions[:, -1] - paths.goals, axis=-1)
    assert left.max() < REACHED


@EACH
def test_what_is_recorded_is_what_a_robot_would_do(task):
    paths = demonstrate(task, EPISODES, 2)
    for tick in range(paths.positions.shape[1] - 1):
        moved = move(task, paths.positions[:, tick], paths.velocities[:, tick], paths.wanted[:, tick])
        assert np.allclose(moved[0], paths.positions[:, tick + 1])
        assert np.allclose(moved[1], paths.velocities[:, tick + 1])


def test_reactions_lag_by_each_number_of_ticks():
    """Robots that rest: they stay so for the lag, and never longer."""
    task = TASKS["chase-eight"]
    paths = demonstrate(task, 400, 3)
    rests = (np.abs(paths.velocities[:, 0]).max((1, 2)) == 0) & (
        np.linalg.norm(paths.positions[:, 0] - paths.goals, axis=-1)[:, 0] > 4 * REACHED
    )
    towards = np.einsum("etrc,erc->etr", paths.wanted, paths.goals - paths.positions[:, 0])[rests, :, 0]
    # 0.02 of a way of 0.6 and more: what settling to the old disc's middle does not have.
    begin = (towards > 0.02 * 0.6).argmax(axis=1)
    assert set(begin) == set(range(MOST_LAG + 1))


@EACH
def test_the_picture_shows_the_new_scene_from_the_first_tick_on(task):
    source = Demonstrations(task, 4)
    paths = demonstrate(task, 4, 0)
    for number in range(4):
        episode = source.load(number)
        for tick in (0, 3, 20):
            env = PointEnv(task)
            env.begin(0)
            obstacle = None if paths.obstacles is None else paths.obstacles[number]
            env.changes[0] = type(env.changes[0])(0, Scene(paths.goals[number], obstacle), counts=False)
            env.positions, env.velocities = paths.positions[number, tick], paths.velocities[number, tick]
            seen = robots.observe(env)
            assert np.array_equal(episode.image("top", tick), seen.images["top"])
            assert np.array_equal(episode.motion.state(tick)[0], seen.state)


def test_places_are_anchored_as_the_layout_has_it():
    task = TASKS["chase-two"]
    paths, source = demonstrate(task, 3, 0), Demonstrations(task, 3)
    own = source.load(1).motion
    targets = robots.poses(paths.positions[1] + paths.wanted[1], paths.velocities[1])
    theirs = BimanualMotion(robots.poses(paths.positions[1], paths.velocities[1]), targets, own.columns)
    for tick in (0, 11):
        assert np.allclose(own.actions(tick, CHUNK), theirs.actions(tick, CHUNK), atol=1e-12)
        assert np.array_equal(own.state(tick), theirs.state(tick))
        back = recover(own.actions(tick, CHUNK), robots.poses(paths.positions[1, tick], paths.velocities[1, tick]))
        assert np.allclose(back.right.position_m[:, :2], (paths.positions[1] + paths.wanted[1])[tick:, 1][:CHUNK])


@pytest.mark.parametrize("name", ["chase-two", "two-ways"])
def test_windows_of_a_dataset(name):
    source = DATASETS[name]()
    again = DATASETS[name]()
    windows = Windows(source, range(8), CHUNK)
    sample, twin = windows.sample(17), Windows(again, range(8), CHUNK).sample(17)
    assert np.array_equal(sample.actions, twin.actions)
    assert np.array_equal(sample.images["top"], twin.images["top"])
    assert sample.mask.all(0).nonzero()[0].tolist() == list(TASKS[name].columns)
    assert sample.actions[:, ~sample.mask.any(0)].max() == 0
