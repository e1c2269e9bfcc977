"""What training would take, and take wrongly: angles that wrap, columns that hardly move, pictures upside down.

An episode is looked at where it is read (Glance.of); what only a whole dataset shows is found afterwards, from all
glances.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from xr0_engine.training.data.episode import Episode

TURN_JUMP = 0.9
"""Of a full turn. No joint moves so far from one tick to the next, and an angle that wraps moves by all of it."""
TURNS = {"rad": 2 * np.pi, "degrees": 360.0}
TURN_SPAN = 1.01
"""Of a full turn: what the values of an angle that wraps keep within, noise included."""
TYPICAL_STEP = 0.1
"""Of a full turn: what an angle moves by from tick to tick. Steps, and columns that jump about, move by more."""
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
MIRRORED_ALIKE, MIRRORED_MARGIN = 0.8, 0.5
"""The same for what is rarer: mirrored, or turned by a quarter."""


@dataclass(frozen=True, eq=False)
class Glance:
    """What of an episode is needed to judge its dataset.

    values: action column -> how often its most common value comes, under that value. count: ticks. mean, squares: (A,)
    float64, per column, squares the sum of squared distances from the mean. columns: (A,) bool, those it knows.
    pictures: view -> (THUMBNAIL, THUMBNAIL) float32, grey. sizes: view -> (height, width) of pictures
    that are not cut out of larger ones, which may differ.
    """

    columns: np.ndarray
    count: int
    mean: np.ndarray
    squares: np.ndarray
    values: Mapping[int, tuple[float, int]]
    pictures: Mapping[str, np.ndarray]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)

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
            sizes={
                view: pictures[0].shape[:2]
                for view, pictures in frames.items()
                if pictures and episode.clips[view].crop is None
            },
        )


def wraps(actions: np.ndarray, columns: Sequence[int]) -> list[str]:
    """The first place in each column at which an angle jumps by a turn. actions: (N, A), absolute, tick by tick."""
    faults = []
    for column in columns:
        path = actions[:, column]
        for unit, turn in TURNS.items():
            # Wider than a turn it is no angle that was wrapped.
            if np.ptp(path) > TURN_SPAN * turn:
                continue
            tick = _first_wrap(path, turn)
            if tick is not None:
                faults.append(
                    f"tick {tick + 1}: action column {column} jumps by a turn, from {path[tick]:.4g} to "
                    f"{path[tick + 1]:.4g} {unit}: an angle that wraps"
                )
            break
    return faults


def _first_wrap(path: np.ndarray, turn: float) -> int | None:
    """The first step that is a full turn but for what the path moves by elsewhere. path: (N,)."""
    steps = np.abs(np.diff(path))
    is_jump = steps > TURN_JUMP * turn
    others = steps[~is_jump]
    if len(others) and np.median(others) > TYPICAL_STEP * turn:
        return None
    # An opening of 6 is nearly a turn, too, but no motion is left when it is unwrapped as one.
    left = max(2 * others.max(initial=0), (1 - TURN_JUMP) * turn / 10)
    found = np.flatnonzero(is_jump & (np.abs(steps - turn) <= left))
    return int(found[0]) if len(found) else None


def hardly_moving(glances: Sequence[Glance], two_valued: Collection[int] = ()) -> list[str]:
    """Action columns that move, but so little or so seldom that their statistics are of noise.

    two_valued: columns that are known to have two values, however seldom the one.
    """
    count = sum(glance.count for glance in glances)
    if count < FEWEST_TICKS:
        return []
    mean = sum(glance.count * glance.mean for glance in glances) / count
    squares = sum(glance.squares + glance.count * (glance.mean - mean) ** 2 for glance in glances)
    std = np.sqrt(squares / count)
    faults = []
    for column in np.flatnonzero(np.any([glance.columns for glance in glances], axis=0)).tolist():
        known = [glance for glance in glances if column in glance.values]
        common: Counter[float] = Counter()
        for glance in known:
            value, times = glance.values[column]
            common[value] += times
        value, times = common.most_common(1)[0]
        if times == count:
            # It never moves: the statistics say so, and the model neither sees nor sets it.
            continue
        moving = sum(glance.values[column][1] < glance.count for glance in known)
        # A gripper that opens once at the end of every episode says something; one that twitched in one, nothing.
        is_event = column in two_valued or (len(known) >= FEWEST_EPISODES and 2 * moving >= len(known))
        how = None
        if std[column] < STILL_STD:
            how = f"has a standard deviation of {std[column]:.1e}, which is noise"
        elif times >= STILL_SHARE * count and not is_event:
            how = f"is {value:.6g} at {times} of {count} ticks"
        if how:
            faults.append(f"action column {column} {how}: leave it out, or give it in units in which it moves")
    return faults


def turned(glances: Sequence[Glance]) -> list[dict[str, str]]:
    """Of each episode: view -> how its pictures lie (see lying), where they do not lie as those of most others do."""
    found: list[dict[str, str]] = [{} for _ in glances]
    for view in {view: None for glance in glances for view in glance.pictures}:
        places = [place for place, glance in enumerate(glances) if view in glance.pictures]
        if len(places) < FEWEST_EPISODES:
            continue
        for place, how in zip(places, _odd_ones([glances[place].pictures[view] for place in places]), strict=True):
            if how:
                found[place][view] = how
    return found


def _odd_ones(pictures: Sequence[np.ndarray]) -> list[str | None]:
    usual = np.median(pictures, axis=0)
    found = [lying(picture, usual) for picture in pictures]
    if any(found):
        return found
    # Where about as many lie in either way, the median is of neither.
    unlike = np.array([lying(picture, pictures[0]) is not None for picture in pictures])
    odd = unlike if 2 * unlike.sum() <= len(pictures) else ~unlike
    if 3 * odd.sum() < len(pictures):
        return found
    usual = np.median([picture for picture, is_odd in zip(pictures, odd, strict=True) if not is_odd], axis=0)
    return [lying(picture, usual) for picture in pictures]


def several_sizes(glances: Sequence[Glance]) -> list[dict[str, str]]:
    """Of each episode: view -> its pictures' size and that of most others, where they are not the same."""
    views = {view: None for glance in glances for view in glance.sizes}
    most = {
        view: Counter(glance.sizes[view] for glance in glances if view in glance.sizes).most_common(1)[0][0]
        for view in views
    }
    return [
        {
            view: f"{size[1]}x{size[0]}, most others' {most[view][1]}x{most[view][0]}"
            for view, size in glance.sizes.items()
            if size != most[view]
        }
        for glance in glances
    ]


def usual_pictures(glances: Sequence[Glance]) -> dict[str, np.ndarray]:
    """View -> what its pictures are like over all episodes that have some."""
    views = {view: None for glance in glances for view in glance.pictures}
    return {
        view: np.median([glance.pictures[view] for glance in glances if view in glance.pictures], axis=0)
        for view in views
    }


def lying(picture: np.ndarray, usual: np.ndarray) -> str | None:
    """How a thumbnail lies that is like the usual one only when it is turned or mirrored; None for any other."""
    as_it_is = _correlation(picture, usual)
    ways = {
        "upside down": (picture[::-1, ::-1], TURNED_ALIKE, TURNED_MARGIN),
        "upside down and mirrored": (picture[::-1], MIRRORED_ALIKE, MIRRORED_MARGIN),
        "on their side": (np.rot90(picture), MIRRORED_ALIKE, MIRRORED_MARGIN),
        "on their other side": (np.rot90(picture, -1), MIRRORED_ALIKE, MIRRORED_MARGIN),
    }
    alike = {how: _correlation(other, usual) for how, (other, _, _) in ways.items()}
    best = max(alike, key=lambda how: alike[how])
    _, least, margin = ways[best]
    return best if alike[best] > least and alike[best] > as_it_is + margin else None


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
