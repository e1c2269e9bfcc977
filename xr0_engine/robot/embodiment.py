"""Embodiment profiles as data: a robot's cameras, their names in the prompt, how it is driven (spec sections 3.2, 7).

The built-in profiles are the YAML files in embodiments/; docs/embodiments.md says how to write another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from xr0_engine.robot.layouts import LAYOUTS, Layout, find_layout

_BUILTIN_FOLDER = Path(__file__).parent / "embodiments"


@dataclass(frozen=True)
class View:
    """One camera.

    key: its name in Observation.images. title: its name in the prompt, as in training.
    rotate_180: turn the image by half a turn first. center_crop: fraction of each side that is kept, in (0, 1].
    Raises ValueError that lists every wrong field.
    """

    key: str
    title: str
    rotate_180: bool = False
    center_crop: float = 1.0

    def __post_init__(self) -> None:
        _refuse(f"view {self.key!r}", _wrong_values(View, vars(self)))


@dataclass(frozen=True)
class Embodiment:
    """A robot as the model knows it.

    robot_types: keys of a checkpoint's action statistics for which this profile is chosen when none is named.
    views: in the order of the prompt. layout: the name of action_layout, what the robot's action columns are.
    control_rate_hz: actions executed per second. replan_every: actions executed before the next inference starts,
    None where inference runs beside execution. Raises ValueError that lists every wrong field.
    """

    name: str
    robot_types: tuple[str, ...]
    views: tuple[View, ...]
    layout: str
    control_rate_hz: float
    replan_every: int | None

    def __post_init__(self) -> None:
        _refuse(f"embodiment {self.name!r}", _wrong_values(Embodiment, vars(self)))

    @property
    def action_layout(self) -> Layout:
        return find_layout(self.layout)


def builtin_embodiments() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _BUILTIN_FOLDER.glob("*.yaml")))


def load_embodiment(name_or_path: str | Path) -> Embodiment:
    """Read a built-in profile by its name, or any profile by the path of its YAML file.

    Raises ValueError if there is no such profile, or one that names the file and every wrong field in it.
    """
    if name_or_path in builtin_embodiments():
        return _read(_BUILTIN_FOLDER / f"{name_or_path}.yaml")
    path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(builtin_embodiments())
        raise ValueError(f"embodiment: expected {names} or the path of a YAML file, got {str(name_or_path)!r}")
    return _read(path)


def embodiment_for(robot_type: str) -> Embodiment:
    """The built-in profile that lists the robot type. Raises ValueError that lists the known ones."""
    profiles = _builtin_by_robot_type()
    if robot_type not in profiles:
        raise ValueError(
            f"robot_type: no built-in embodiment profile lists {robot_type!r}, known are {', '.join(profiles)}; "
            f"name a profile: one of {', '.join(builtin_embodiments())}, or the path of your own YAML file "
            "(docs/embodiments.md)"
        )
    return profiles[robot_type]


@cache
def _builtin_by_robot_type() -> dict[str, Embodiment]:
    profiles = (load_embodiment(name) for name in builtin_embodiments())
    return {robot_type: profile for profile in profiles for robot_type in profile.robot_types}


def _read(path: Path) -> Embodiment:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: expected a mapping of fields, got {raw!r}")
    # Lists become the tuples that the dataclasses hold. Views that are wrong are reported one by one, not as a field.
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    views = values.get("views")
    raw_views = views if isinstance(views, tuple) else ()
    view_problems = [
        f"views[{index}] {problem}"
        for index, view in enumerate(raw_views)
        for problem in _wrong_names(View, view) + _wrong_values(View, view)
    ]
    if view_problems:
        del values["views"]
    elif raw_views:
        values["views"] = tuple(View(**view) for view in raw_views)
    _refuse(str(path), _wrong_names(Embodiment, raw) + _wrong_values(Embodiment, values) + view_problems)
    return Embodiment(**values)


def _refuse(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{owner}: " + "; ".join(problems))


def _wrong_names(kind: type, values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"expected a mapping of fields, got {values!r}"]
    required = {item.name: item.default is MISSING for item in fields(kind)}
    missing = [f"{name}: missing" for name, is_required in required.items() if is_required and name not in values]
    unknown = [name for name in values if name not in required]
    return missing + [f"{name}: unknown, expected one of {', '.join(required)}" for name in unknown]


def _wrong_values(kind: type, values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []
    return [
        f"{name}: expected {expected}, got {values[name]!r}"
        for name, (is_right, expected) in _RULES[kind].items()
        if name in values and not is_right(values[name])
    ]


def _is_line(value: object) -> bool:
    return isinstance(value, str) and value.strip() == value != "" and value.isprintable() and "<|" not in value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _are_views(value: Any) -> bool:
    if not isinstance(value, tuple) or not value or not all(isinstance(view, View) for view in value):
        return False
    return len({view.key for view in value}) == len({view.title for view in value}) == len(value)


_LINE = "text on one line, without <| and outer spaces"
_RULES: dict[type, dict[str, tuple[Callable[[Any], bool], str]]] = {
    View: {
        "key": (_is_line, _LINE),
        "title": (_is_line, _LINE),
        "rotate_180": (lambda value: isinstance(value, bool), "true or false"),
        "center_crop": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
    },
    Embodiment: {
        "name": (_is_line, _LINE),
        "robot_types": (
            lambda value: isinstance(value, tuple) and all(_is_line(name) for name in value),
            "a list of names (it may be empty)",
        ),
        "views": (_are_views, "a list of at least one view, no key or title twice"),
        "layout": (lambda value: value in tuple(LAYOUTS), f"one of {', '.join(LAYOUTS)}"),
        "control_rate_hz": (lambda value: _is_number(value) and value > 0, "a number above 0"),
        "replan_every": (
            lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0),
            "a whole number above 0, or null",
        ),
    },
}
