"""Embodiment profiles as data: a robot's cameras, their names in the prompt, how it is driven (spec sections 3.2, 7).

The built-in profiles are the YAML files in embodiments/; docs/embodiments.md says how to write another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

# Whoever lacks PyYAML is told at the import, not at the first profile.
import yaml as yaml

from xr0_engine.files import FAULTS, is_number, one_line, read_json, read_yaml, reading
from xr0_engine.part_configs import COLUMNS, STEPS
from xr0_engine.robot.history import FrameHistory
from xr0_engine.robot.layouts import LAYOUTS, PLAIN, Layout, find_layout
from xr0_engine.robot.templates import INSTRUCTION_RULES, TEMPLATES, TITLED, PromptForm, video_form
from xr0_engine.types import CheckpointError, RobotInfo, ViewInfo

_BUILTIN_FOLDER = Path(__file__).parent / "embodiments"

PRETRAINED_CHUNKS = {"agibot_pt_v3": 30, "droid_pt": 15, "midata_mix_ann_pt_v1": 30, "molmoact_pt": 15}
"""Robot type of the pre-trained model -> actions in a chunk: all of these robots that has been published."""

CHECKPOINT_KEY = "embodiment"
"""Of a checkpoint's config.json: the profile that a run named in the place of the built-in ones, its fields as JSON."""

LARGEST_SIDE = 4096
"""Pixels that a view may be resized to."""
MOST_VIEWS = 32
"""The released robots have three at most."""
LONGEST_LINE = 200
"""Characters of a name or title; every prompt holds the titles."""
RESIZE_FILTERS = ("bicubic", "bilinear")
"""Pillow's."""
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 0.01, 1000.0
"""Of control: what the executor's loop does at most; and an action in a minute and a half."""


@dataclass(frozen=True)
class View:
    """One camera.

    key: its name in Observation.images. title: its name in the prompt, as in training.
    rotate_180: turn a frame by half a turn first. resize: then bring it to (height, width), its aspect not kept, by the
    resize_filter; None leaves its size. center_crop: then keep this fraction of each side, in (0, 1], and enlarge it to
    the size before.
    Raises ValueError that lists every wrong field.
    """

    key: str
    title: str
    rotate_180: bool = False
    center_crop: float = 1.0
    resize: tuple[int, int] | None = None
    resize_filter: str = "bicubic"

    def __post_init__(self) -> None:
        _refuse(f"view {self.key!r}", _wrong_values(View, vars(self)))


@dataclass(frozen=True)
class Embodiment:
    """A robot as the model knows it.

    robot_types: keys of a checkpoint's action statistics for which this profile is chosen when none is named.
    views: in the order of the prompt; those that share a title stand one behind the other. layout: the name of
    action_layout, what the robot's action columns are.
    control_rate_hz: actions executed per second. replan_every: actions executed before the next inference starts,
    None where inference runs beside execution. step_columns: action columns that say how far to move, not where to;
    layout plain only, other layouts know theirs. two_valued_columns: those with nothing between their values, such as a
    gripper that is open or closed. None: not known. prompt: the name of a template. instruction: one of
    INSTRUCTION_RULES, None leaves it to the checkpoint. history: what each view shows of the past, None: one picture.
    Raises ValueError that lists every wrong field.
    """

    name: str
    robot_types: tuple[str, ...]
    views: tuple[View, ...]
    layout: str
    control_rate_hz: float
    replan_every: int | None
    step_columns: tuple[int, ...] | None = None
    two_valued_columns: tuple[int, ...] | None = None
    prompt: str = TITLED.template
    instruction: str | None = None
    history: FrameHistory | None = None

    def __post_init__(self) -> None:
        _refuse(f"embodiment {self.name!r}", _wrong_values(Embodiment, vars(self)))

    @property
    def action_layout(self) -> Layout:
        return find_layout(self.layout)

    def prompt_form(self, temporal_patch: int) -> PromptForm:
        """temporal_patch: frames in a patch of the vision tower. Raises ValueError for a history that they do not
        divide."""
        if self.history is None:
            return PromptForm(self.prompt)
        if self.history.frames % temporal_patch:
            raise ValueError(
                f"embodiment {self.name!r}: history: expected a multiple of {temporal_patch} frames, as the model's "
                f"temporal patches have, got {self.history.frames}"
            )
        return video_form(self.prompt, self.history.frames, temporal_patch)

    def robot_info(
        self, chunk_length: int, action_width: int, max_prefix: int, state_length: int | None = None
    ) -> RobotInfo:
        """The profile as a policy tells it, which knows the rest: T, A, the longest prefix it was trained with, states
        of an observation."""
        return RobotInfo(
            chunk_length=chunk_length,
            control_rate_hz=float(self.control_rate_hz),
            replan_every=self.replan_every,
            views=tuple(view.key for view in self.views),
            layout=self.layout,
            action_width=action_width,
            max_prefix=min(max_prefix, chunk_length - 1),
            step_columns=self.step_columns,
            two_valued_columns=self.two_valued_columns,
            preparation=tuple(
                ViewInfo(view.title, view.rotate_180, view.resize, view.center_crop, view.resize_filter)
                for view in self.views
            ),
            embodiment=self.name,
            history=None if self.history is None else (self.history.frames, self.history.stride),
            state_length=None if state_length == 1 else state_length,
        )


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


def checkpoint_embodiment(folder: Path) -> Embodiment | None:
    """The profile of its own that a checkpoint was trained through; None if its config.json names none.

    Raises CheckpointError that names the file and every wrong field of the profile.
    """
    path = folder / "config.json"
    content = read_json(path)
    raw = content.get(CHECKPOINT_KEY) if isinstance(content, Mapping) else None
    if raw is None:
        return None
    try:
        return embodiment_from(f"{path}: {CHECKPOINT_KEY}", raw)
    except FAULTS as error:
        raise CheckpointError(one_line(error)) from None


def embodiment_for(robot_type: str) -> Embodiment:
    """The built-in profile that lists the robot type.

    Raises ValueError that lists the known ones, and says what is known of a robot type of the pre-trained model.
    """
    profiles = _builtin_by_robot_type()
    if robot_type not in profiles:
        raise ValueError(
            f"robot_type: no built-in embodiment profile lists {robot_type!r}, known are {', '.join(profiles)}; "
            f"name a profile: one of {', '.join(builtin_embodiments())}, or the path of your own YAML file "
            f"(docs/embodiments.md){_pretrained_note(robot_type)}"
        )
    return profiles[robot_type]


def _pretrained_note(robot_type: str) -> str:
    if robot_type not in PRETRAINED_CHUNKS:
        return ""
    return (
        f". {robot_type} is of the pre-trained model: its chunks have {PRETRAINED_CHUNKS[robot_type]} actions; which "
        "views it saw under which titles, what its columns are and at which rate they run was never published, so "
        "only a profile of your own can say it"
    )


@cache
def _builtin_by_robot_type() -> dict[str, Embodiment]:
    profiles = (load_embodiment(name) for name in builtin_embodiments())
    return {robot_type: profile for profile in profiles for robot_type in profile.robot_types}


def _read(path: Path) -> Embodiment:
    raw = read_yaml(path, ValueError)
    with reading(path, ValueError):
        return embodiment_from(str(path), raw)


def embodiment_from(where: str, raw: Any) -> Embodiment:
    """The profile of a mapping, as YAML files and checkpoints hold one. Raises ValueError that names every wrong field.

    where: what the message begins with.
    """
    if not isinstance(raw, Mapping):
        raise ValueError(f"{where}: expected a mapping of fields, got {raw!r:.80}")
    # Lists become the tuples that the dataclasses hold. Views that are wrong are reported one by one, not as a field.
    values = _with_tuples(raw)
    views = values.get("views")
    raw_views = [_with_tuples(view) for view in views] if isinstance(views, tuple) else []
    view_problems = [
        f"views[{index}] {problem}"
        for index, view in enumerate(raw_views)
        for problem in _wrong_names(View, view) + _wrong_values(View, view)
    ]
    if view_problems:
        del values["views"]
    elif raw_views:
        values["views"] = tuple(View(**view) for view in raw_views)
    if isinstance(history := values.get("history"), Mapping):
        view_problems += [f"history: {problem}" for problem in _wrong_names(FrameHistory, history)]
        try:
            values["history"] = None if view_problems else FrameHistory(**history)
        except ValueError as error:
            view_problems.append(str(error))
            del values["history"]
    _refuse(where, _wrong_names(Embodiment, raw) + _wrong_values(Embodiment, values) + view_problems)
    return Embodiment(**values)


def _with_tuples(raw: Any) -> Any:
    if not isinstance(raw, Mapping):
        return raw
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}


def _refuse(owner: str, problems: list[str]) -> None:
    if problems:
        raise ValueError(f"{owner}: " + "; ".join(problems))


def _wrong_names(kind: type, values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return [f"expected a mapping of fields, got {values!r:.80}"]
    required = {item.name: item.default is MISSING for item in fields(kind)}
    missing = [f"{name}: missing" for name, is_required in required.items() if is_required and name not in values]
    unknown = [name for name in values if name not in required]
    return missing + [f"{name!s:.80}: unknown, expected one of {', '.join(required)}" for name in unknown]


def _wrong_values(kind: type, values: Any) -> list[str]:
    if not isinstance(values, Mapping):
        return []
    return [
        f"{name}: expected {expected}, got {values[name]!r:.80}"
        for name, (is_right, expected) in _RULES[kind].items()
        if name in values and not is_right(values[name])
    ] + (_contradictions(values) if kind is Embodiment else [])


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    steps, two_valued = (values.get(name) or () for name in ("step_columns", "two_valued_columns"))
    if not (_are_columns(steps) and _are_columns(two_valued)):
        return []
    found = []
    if steps and values.get("layout") != PLAIN.name:
        found.append(f"step_columns: expected only with layout {PLAIN.name}: another layout knows its columns itself")
    if both := sorted({*steps} & {*two_valued}):
        found.append(f"two_valued_columns: expected none of step_columns, got {both}")
    return found


def _is_line(value: object) -> bool:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_LINE:
        return False
    return value.strip() == value and value.isprintable() and "<|" not in value


def _is_number(value: object) -> bool:
    return is_number(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_side(side) for side in value)


def _is_side(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIDE


def _are_views(value: Any) -> bool:
    if not isinstance(value, tuple) or not 0 < len(value) <= MOST_VIEWS:
        return False
    if not all(isinstance(view, View) for view in value):
        return False
    # A title twice is one heading over several views: what stands between them would come under it too.
    headings = [title for title, _ in groupby(view.title for view in value)]
    return len({view.key for view in value}) == len(value) and len(set(headings)) == len(headings)


def _are_columns(value: Any) -> bool:
    """Also None."""
    return value is None or (
        isinstance(value, tuple)
        and all(type(column) is int and 0 <= column < COLUMNS[1] for column in value)
        and len(set(value)) == len(value)
    )


_COLUMNS = "a list of columns counted from 0, none twice, or null"
_LINE = f"text on one line, up to {LONGEST_LINE} characters, without <| and outer spaces"
_RULES: dict[type, dict[str, tuple[Callable[[Any], bool], str]]] = {
    View: {
        "key": (_is_line, _LINE),
        "title": (_is_line, _LINE),
        "rotate_180": (lambda value: isinstance(value, bool), "true or false"),
        "center_crop": (lambda value: _is_number(value) and 0 < value <= 1, "a number above 0, up to 1"),
        "resize": (
            lambda value: value is None or _is_size(value),
            f"[height, width] in whole pixels up to {LARGEST_SIDE}, or null",
        ),
        "resize_filter": (lambda value: value in RESIZE_FILTERS, f"one of {', '.join(RESIZE_FILTERS)}"),
    },
    Embodiment: {
        "name": (_is_line, _LINE),
        "robot_types": (
            lambda value: isinstance(value, tuple) and all(_is_line(name) for name in value),
            "a list of names (it may be empty)",
        ),
        "views": (_are_views, f"a list of 1 to {MOST_VIEWS} views, no key twice, a title again only right behind"),
        "layout": (lambda value: value in tuple(LAYOUTS), f"one of {', '.join(LAYOUTS)}"),
        "control_rate_hz": (
            lambda value: _is_number(value) and LOWEST_RATE_HZ <= value <= HIGHEST_RATE_HZ,
            f"a number from {LOWEST_RATE_HZ:g} to {HIGHEST_RATE_HZ:g}",
        ),
        "replan_every": (
            lambda value: value is None or (type(value) is int and 0 < value <= STEPS[1]),
            f"a whole number above 0, up to {STEPS[1]:g}, or null",
        ),
        "step_columns": (_are_columns, _COLUMNS),
        "two_valued_columns": (_are_columns, _COLUMNS),
        "prompt": (lambda value: value in tuple(TEMPLATES), f"one of {', '.join(TEMPLATES)}"),
        "instruction": (
            lambda value: value is None or value in INSTRUCTION_RULES,
            f"one of {', '.join(INSTRUCTION_RULES)}, or null",
        ),
        "history": (
            lambda value: value is None or isinstance(value, FrameHistory),
            "a mapping of frames and stride, or null",
        ),
    },
}
