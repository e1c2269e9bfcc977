"""`guard.json`: what a robot's training data looked like, and from which score on a guard warns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import flag, is_number, number, read_json, reading, section, text, whole
from xr0_engine.guard.looks import GRID
from xr0_engine.types import FileError, RobotInfo
from xr0_engine.whole import write_whole

VERSION = 1
MOST_INSTRUCTIONS = 10_000
"""That are kept; a dataset with more has so many that a new one says nothing."""
WIDEST = 1024
ALWAYS_OF_VIEWS = ("brightness", "contrast", "unlike", "turned")
OF_THE_ROBOT = ("state range", "state jump", "state frozen", "state astray", "bend", "disagreement")
"""Checks that have a threshold (watch.py)."""
DIGITS = 7
"""Of the numbers that are written, after the first."""
CALIBRATE = "make it anew with `xr0 guard calibrate DATASET --checkpoint CHECKPOINT`"


@dataclass(frozen=True, eq=False)
class ViewProfile:
    """A view in training. rotate_180, center_crop: as in ViewInfo. brightness, contrast: lowest and highest, levels.
    mean, std: (GRID, GRID, 3) of its thumbnails (looks.Look). aspects: width over height of its frames, each that there
    was; none where they are not known."""

    key: str
    rotate_180: bool
    center_crop: float
    brightness: tuple[float, float]
    contrast: tuple[float, float]
    mean: np.ndarray
    std: np.ndarray
    aspects: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class Following:
    """How states follow plans. columns: of state and action, those in which the state goes where the plan says.
    relative: bool each, whether an action adds to the state of its observation. error: how far off they were, the 99 %
    quantile, robot units."""

    columns: np.ndarray
    relative: np.ndarray
    error: np.ndarray


@dataclass(frozen=True, eq=False)
class RobotProfile:
    """A robot type's training data, and its thresholds.

    low, high: (S,) of each state column, robot units; scale: (S,) what a distance in it is measured by. speed: (S,) the
    fastest change per second. instructions: as `plain` writes them; None where there are too many. following: None
    where no state column follows the plan. thresholds: name of a score -> from where on it is a warning. facts: what it
    was calibrated on, for people. statistics: digest of the policy's action statistics, None without a checkpoint.
    """

    robot_type: str
    control_rate_hz: float
    action_width: int
    layout: str
    views: tuple[ViewProfile, ...]
    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    speed: np.ndarray
    instructions: tuple[str, ...] | None
    following: Following | None
    thresholds: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    statistics: str | None = None

    def check(self, path: Path, info: RobotInfo, statistics: str | None = None) -> None:
        """Raises FileError that names every difference to the robot that a policy drives: these are thresholds of
        another. path: where the profile is from. statistics: statistics_digest of the policy's, None: not known."""
        views = tuple(view.key for view in self.views)
        found = [
            f"{name}: the file has {own}, the policy {other}"
            for name, own, other in (
                ("views", ", ".join(views), ", ".join(info.views)),
                ("layout", self.layout, info.layout),
                ("control_rate_hz", f"{self.control_rate_hz:g}", f"{info.control_rate_hz:g}"),
                ("action_width", self.action_width, info.action_width),
            )
            if other is not None and own != other
        ]
        if info.preparation is not None and len(info.preparation) == len(self.views):
            for view, told in zip(self.views, info.preparation, strict=True):
                own, other = ((each.rotate_180, each.center_crop) for each in (view, told))
                if own != other:
                    found.append(
                        f"views: {view.key}: the file has rotate_180 {own[0]} and center_crop {own[1]:g}, the policy "
                        f"{other[0]} and {other[1]:g}"
                    )
        if None not in (statistics, self.statistics) and statistics != self.statistics:
            found.append("statistics: the file was calibrated with another checkpoint's action statistics")
        if found:
            raise FileError(f"{path}: {self.robot_type!r} is another robot there: {'; '.join(found)}: {CALIBRATE}")


def plain(instruction: str) -> str:
    """An instruction as it is compared: case, spaces and a full stop at its end are of no account."""
    return " ".join(instruction.split()).rstrip(".!").casefold()


def statistics_digest(mean: np.ndarray, std: np.ndarray) -> str:
    """Of a robot type's action statistics, (T, A) each."""
    numbers = np.stack([mean, std]).astype(np.float32)
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]


def write_guard(path: Path, profile: RobotProfile) -> None:
    """Put a robot type's profile into a file, new or there; other robot types' stay. Raises FileError, OSError."""
    robots = read_guard(path) if path.exists() else {}
    robots[profile.robot_type] = profile
    told = {name: _to_json(robot) for name, robot in sorted(robots.items())}
    write_whole(path, json.dumps({"version": VERSION, "robots": told}, indent=1) + "\n")


def read_guard(path: Path) -> dict[str, RobotProfile]:
    """Robot type -> its profile. Raises FileError that names file, field and remedy; OSError."""
    raw = read_json(path, FileError)
    with reading(path, FileError, f": remove it, and {CALIBRATE}"):
        version = whole(raw, "version")
        if version != VERSION:
            raise ValueError(f"version: expected {VERSION}, got {version}")
        robots = section(raw, "robots")
        if not robots:
            raise ValueError("robots: expected at least one robot type")
    found = {}
    for name, robot in robots.items():
        with reading(f"{path}: robots: {name!r:.80}", FileError, f": remove it, and {CALIBRATE}"):
            found[name] = _from_json(name, robot)
    return found


def _to_json(robot: RobotProfile) -> dict[str, Any]:
    names = ("control_rate_hz", "action_width", "layout", "statistics", "facts", "thresholds")
    following = robot.following
    return {
        **{name: getattr(robot, name) for name in names},
        "instructions": None if robot.instructions is None else list(robot.instructions),
        "state": {name: _rounded(getattr(robot, name)) for name in ("low", "high", "scale", "speed")},
        "following": None if following is None else {name: _rounded(rows) for name, rows in asdict(following).items()},
        "views": [asdict(view) | {"mean": _rounded(view.mean), "std": _rounded(view.std)} for view in robot.views],
    }


def _rounded(values: np.ndarray) -> list[Any]:
    if values.dtype.kind != "f":
        return list(values.tolist())
    return [float(f"{value:.{DIGITS}g}") for value in values.ravel().tolist()]


def _from_json(name: str, raw: Mapping[str, Any]) -> RobotProfile:
    state, views, following = section(raw, "state"), raw["views"], raw["following"]
    if not isinstance(views, list) or not views:
        raise ValueError("views: expected a list of at least one")
    low = numbers(state, "low")
    thresholds = section(raw, "thresholds")
    statistics, instructions = raw["statistics"], raw["instructions"]
    if statistics is not None and not isinstance(statistics, str):
        raise TypeError(f"statistics is {statistics!r:.80}, neither text nor null")
    if instructions is not None and not (
        isinstance(instructions, list) and all(isinstance(words, str) for words in instructions)
    ):
        raise TypeError(f"instructions is {instructions!r:.80}, neither a list of text nor null")
    robot = RobotProfile(
        robot_type=name,
        control_rate_hz=number(raw, "control_rate_hz", least=1e-3, most=1e4),
        action_width=whole(raw, "action_width", least=1, most=WIDEST),
        layout=text(raw, "layout"),
        views=tuple(_view(view) for view in views),
        low=low,
        high=numbers(state, "high", len(low)),
        scale=numbers(state, "scale", len(low), above=0),
        speed=numbers(state, "speed", len(low), above=0),
        instructions=None if instructions is None else tuple(instructions),
        following=None if following is None else _following(following, len(low), whole(raw, "action_width")),
        thresholds={score: number(thresholds, score) for score in thresholds},
        facts=section(raw, "facts"),
        statistics=statistics,
    )
    if (robot.low > robot.high).any():
        raise ValueError("state: low: expected at most high in every column")
    if len({view.key for view in robot.views}) < len(robot.views):
        raise ValueError("views: expected each key once")
    _check_thresholds(robot)
    return robot


def _check_thresholds(robot: RobotProfile) -> None:
    """Each of a check that there is, and all that need neither a policy nor motion: a check without one never warns."""
    keys = [view.key for view in robot.views]
    needed = {f"{check} {key}" for check in ALWAYS_OF_VIEWS for key in keys} | {"state range"}
    known = needed | {f"{check} {key}" for check in ("frozen", "swapped") for key in keys} | {*OF_THE_ROBOT}
    if unknown := sorted(set(robot.thresholds) - known):
        raise ValueError(f"thresholds: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    if missing := sorted(needed - set(robot.thresholds)):
        raise ValueError(f"thresholds: {', '.join(missing)}: missing")


def _view(raw: Mapping[str, Any]) -> ViewProfile:
    shape = (GRID, GRID, 3)
    return ViewProfile(
        key=text(raw, "key"),
        rotate_180=flag(raw, "rotate_180"),
        center_crop=number(raw, "center_crop", least=1e-3, most=1),
        brightness=_pair(raw, "brightness"),
        contrast=_pair(raw, "contrast"),
        mean=numbers(raw, "mean", GRID * GRID * 3).reshape(shape).astype(np.float32),
        std=numbers(raw, "std", GRID * GRID * 3, least=0).reshape(shape).astype(np.float32),
        aspects=tuple(numbers(raw, "aspects", len(raw["aspects"]), above=0).tolist()),
    )


def _pair(raw: Mapping[str, Any], name: str) -> tuple[float, float]:
    low, high = numbers(raw, name, 2, least=0).tolist()
    if low > high:
        raise ValueError(f"{name}: expected the lower number first, got {low:g}, {high:g}")
    return low, high


def _following(raw: Mapping[str, Any], states: int, actions: int) -> Following:
    columns, relative = raw["columns"], raw["relative"]
    if not isinstance(columns, list) or not columns:
        raise ValueError("following: columns: expected a list of at least one")
    most = min(states, actions) - 1
    checked = [whole({"following: columns": column}, "following: columns", least=0, most=most) for column in columns]
    if not isinstance(relative, list) or [type(one) for one in relative] != [bool] * len(columns):
        raise ValueError(f"following: relative: expected true or false for each of {len(columns)} columns")
    return Following(np.array(checked), np.array(relative), numbers(raw, "error", len(columns), above=0))


def numbers(
    raw: Mapping[str, Any],
    name: str,
    count: int | None = None,
    least: float | None = None,
    above: float | None = None,
) -> np.ndarray:
    """(count,) float64 of a JSON object's list. count: None takes any from 1 to WIDEST. Raises TypeError, ValueError,
    KeyError as files.number does."""
    values: Sequence[Any] = raw[name]
    if not isinstance(values, list) or not all(map(is_number, values)):
        raise TypeError(f"{name} is {values!r:.80}, not a list of numbers")
    if len(values) != count and (count is not None or not 1 <= len(values) <= WIDEST):
        raise ValueError(f"{name}: expected {count or f'1 to {WIDEST}'} numbers, got {len(values)}")
    array = np.array(values, np.float64)
    if (least is not None and (array < least).any()) or (above is not None and (array <= above).any()):
        raise ValueError(f"{name}: expected numbers {'above 0' if least is None else 'of at least 0'}")
    return array
