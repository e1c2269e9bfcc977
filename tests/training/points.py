"""Datasets by function that tests name: a dot whose speed is the robot's state, and some that are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from xr0_engine.robot.embodiment import Embodiment, View, load_embodiment
from xr0_engine.training.data.description import Description
from xr0_engine.training.data.episode import Episode
from xr0_engine.training.data.motion import PlainMotion
from xr0_engine.training.data.pictures import Drawn
from xr0_engine.training.data.sources import dataset

EPISODES, TICKS, SIDE, COLUMNS = 8, 12, 32, 32
PROFILE = Embodiment("point", ("point",), (View("top", "Top View"),), "plain", 10.0, None, (0, 1), ())


class Points:
    """Its frames show their own number as a brightness. seed: of the speeds."""

    def __init__(self, seed: int = 0, profile: Embodiment = PROFILE) -> None:
        self.seed = seed
        self.description = Description(Path(), profile.robot_types[0], profile)
        self.names = tuple(f"points#{number}" for number in range(EPISODES))
        self.lengths = (TICKS,) * EPISODES
        self.statuses = ("success",) * EPISODES

    def load(self, number: int) -> Episode:
        states, targets, origins = np.zeros((TICKS, COLUMNS), np.float32), *np.zeros((2, TICKS, COLUMNS))
        targets[:, :2] = np.random.default_rng((self.seed, number)).uniform(-1, 1, 2)
        states[:, :2] = targets[:, :2]
        # A function within a function: nothing that could be pickled.
        pictures = Drawn(self.names[number], TICKS, 10.0, lambda tick: np.full((SIDE, SIDE, 3), tick, np.uint8))
        views = {view.key: pictures for view in self.description.embodiment.views}
        motion = PlainMotion(states, targets, origins, np.arange(COLUMNS) < 2)
        return Episode(self.names[number], "success", ("Go on.",), views, motion, 10.0)


@dataset
def points() -> Points:
    return Points()


@dataset
def other_points() -> Points:
    return Points(seed=1)


@dataset
def told_points() -> Points:
    """The same dataset as points() by its own account, though it is not."""
    source = Points(seed=1)
    source.digest = "points"
    return source


@dataset
def told_first_points() -> Points:
    source = Points()
    source.digest = "points"
    return source


@dataset
def bridge_points() -> Points:
    """Seen through a built-in profile."""
    return Points(profile=load_embodiment("bridge"))


@dataset
def turned_points() -> Points:
    """Of another profile than points()."""
    return Points(profile=replace(PROFILE, name="turned", views=(View("top", "Top View", rotate_180=True),)))


def unmarked() -> Points:
    return Points()


@dataset
def number() -> int:
    return 3


@dataset
def uneven() -> Points:
    source = Points()
    source.lengths = (TICKS,) * (EPISODES - 1)
    return source


@dataset
def failing() -> Points:
    raise KeyError("speed")


@dataset
def drawn_by_chance() -> Points:
    """What a function without a seed gives."""
    return Points(seed=int(np.random.default_rng().integers(1 << 40)))


@dataset
def shorter_than_said() -> Points:
    source = Points()
    source.lengths = (TICKS + 1,) * EPISODES
    return source


@dataset
def without_view() -> Points:
    source = Points()
    source.load = Points().load
    views = (*PROFILE.views, View("wrist", "Wrist View"))
    source.description = replace(source.description, embodiment=replace(PROFILE, views=views))
    return source
