"""What training would take, and take wrongly: angles that wrap, columns that hardly move, pictures upside down.

An episode is looked at where it is read (Glance.of); what only a whole dataset shows is found afterwards, from all
glances.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from xr0_engine.training.data.episode import Episode

TURN_JUMP = 0.9
"""Of a full turn. No joint moves so far from one tick to the next, and an angle that wraps moves by all of it."""
TURNS = {"rad": 2 * np.pi, "degrees": 360.0}
STILL_STD = 1e-4
"""0.1 mm or 0.1 mrad: sensors are noisier than a robot that is told to move so little."""
STILL_SHARE = 0.99
"""A column that has one value at this share of all ticks says nothing, and its few other values are far out in std."""
FEWEST_TICKS = 100
"""Of a dataset whose columns are judged: a short piece of a motion may stand still."""
THUMBNAIL = 16
FEWEST_EPISODES = 3
"""Of a dataset whose pictures are compared with each other: of two, neither is the odd one."""
TURNED_ALIKE, TURNED_MARGIN = 0.5, 0.3
"""Correlation that a turned picture has at least with the others, and by how much it beats the picture as it is."""


@dataclass(frozen=True, eq=False)
class Glance:
    """What of an episode is needed to judge its dataset.

    values: action column -> how often its most common value comes, under that value. count: ticks. mean, squares: (A,)
    float64, per column, squares the sum of squared distances from the mean. columns: (A,) bool, those it knows.
    pictures: view -> (THUMBNAIL, THUMBNAIL) float32, grey.
    """

    columns: np.ndarray
    count: int
    mean: np.ndarray
    squares: np.ndarray
    values: Mapping[int, tuple[float, int]]
    pictures: Mapping[str, np.ndarray]

    @staticmethod
    def of(episode: Episode, frames: Mapping[str, Sequence[np.ndarray]]) -> Glance:
        """frames: view -> some of its pictures, (height, width, 3) uint8."""
        # From the first tick on: the whole path, seen from where it begins.
        actions = episode.motion.actions(0, len(episode.motion))
        mean = actions.mean(axis=0)
        values = {}
        for column in np.flatnonzero(episode.motion.columns):
            found, counts = np.unique(actions[:, column].astype(np.float32), return_counts=True)
            values[int(column)] = float(found[counts.argmax()]), int(counts.max())
        return Glance(
            columns=episode.motion.columns,
            count=len(actions),
            mean=mean,
            squares=((actions - mean) ** 2).sum(axis=0),
            values=values,
            pictures={view: _thumbnail(pictures) for view, pictures in frames.items() if pictures},
        )


def wraps(actions: np.ndarray, columns: Sequence[int]) -> list[str]:
    """The first place in each column at which an angle jumps by a turn. actions: (N, A), absolute, tick by tick."""
    faults = []
    for column in columns:
        path = actions[:, column]
        jumps = np.abs(np.diff(path))
        for unit, turn in TURNS.items():
            # Beyond a turn on either side it is no angle that was wrapped.
            if np.abs(path).max(initial=0) > 1.01 * turn:
                continue
            found = np.flatnonzero(jumps > TURN_JUMP * turn)
            if len(found):
                tick = int(found[0])
                faults.append(
                    f"tick {tick + 1}: action column {column} jumps by a turn, from {path[tick]:.4g} to "
                    f"{path[tick + 1]:.4g} {unit}: an angle that wraps; `kind: periodic` in xr0.yaml unwraps it"
                )
            break
    return faults


def hardly_moving(glances: Sequence[Glance]) -> list[str]:
    """Action columns that move, but so little or so seldom that their statistics are of noise."""
    count = sum(glance.count for glance in glances)
    if count < FEWEST_TICKS:
        return []
    mean = sum(glance.count * glance.mean for glance in glances) / count
    squares = sum(glance.squares + glance.count * (glance.mean - mean) ** 2 for glance in glances)
    std = np.sqrt(squares / count)
    faults = []
    for column in np.flatnonzero(np.any([glance.columns for glance in glances], axis=0)).tolist():
        common: Counter[float] = Counter()
        for glance in glances:
            if column in glance.values:
                value, times = glance.values[column]
                common[value] += times
        value, times = common.most_common(1)[0]
        if times == count:
            # It never moves: the statistics say so, and the model neither sees nor sets it.
            continue
        how = None
        if std[column] < STILL_STD:
            how = f"has a standard deviation of {std[column]:.1e}, which is noise"
        elif times >= STILL_SHARE * count:
            how = f"is {value:.6g} at {times} of {count} ticks"
        if how:
            faults.append(f"action column {column} {how}: leave it out, or give it in units in which it moves")
    return faults


def turned(glances: Sequence[Glance]) -> list[list[str]]:
    """Of each episode, its views whose pictures lie upside down compared with those of the other episodes."""
    usual = usual_pictures(glances) if len(glances) >= FEWEST_EPISODES else {}
    return [
        [view for view, picture in glance.pictures.items() if view in usual and is_turned(picture, usual[view])]
        for glance in glances
    ]


def usual_pictures(glances: Sequence[Glance]) -> dict[str, np.ndarray]:
    """View -> what its pictures are like over all episodes that have some."""
    views = {view: None for glance in glances for view in glance.pictures}
    return {
        view: np.median([glance.pictures[view] for glance in glances if view in glance.pictures], axis=0)
        for view in views
    }


def is_turned(picture: np.ndarray, usual: np.ndarray) -> bool:
    """Whether a thumbnail is like the usual one only when it is turned by 180 degrees."""
    as_it_is, upside_down = _correlation(picture, usual), _correlation(picture[::-1, ::-1], usual)
    return upside_down > TURNED_ALIKE and upside_down > as_it_is + TURNED_MARGIN


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size > 0 else 0.0


def _thumbnail(pictures: Sequence[np.ndarray]) -> np.ndarray:
    small = [
        Image.fromarray(picture).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        for picture in pictures
    ]
    mean: np.ndarray = np.mean([np.asarray(picture, np.float32) for picture in small], axis=0)
    return mean
