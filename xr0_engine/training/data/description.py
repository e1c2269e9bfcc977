"""What a dataset is of: xr0.yaml in its folder, or a YAML file elsewhere that points to it (docs/data.md).

For LeRobot datasets, whose columns are each robot's own, it also says which of them are which of the model's.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import one_line, read_yaml, reading, text
from xr0_engine.hub import HubId
from xr0_engine.robot.embodiment import Embodiment, View, embodiment_for, load_embodiment
from xr0_engine.robot.mobile import MOBILE_COLUMNS
from xr0_engine.training.data.hub import description_folder, fetch_episodes, find_on_hub
from xr0_engine.training.data.samples import DataError

DESCRIPTION_FILE = "xr0.yaml"
# The robot type of episode files that come without a description: the only one that their format can hold.
DEFAULT_ROBOT_TYPE = "bimanual"
COLUMNS = 32
"""Columns of XR-0's action and state; XR-1's datasets say another `width`."""
MOST_COLUMNS = 1 << 10

ROTATIONS = {"matrix": 9, "axis_angle": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4}
PART_WIDTHS = {"position": 3, "joints": 6, "gripper": 1}

KINDS = ("absolute", "step", "two_valued", "periodic")
"""What an action's columns hold: where to; how far to move until the next row; a value with nothing between it and the
other one; an angle that wraps."""
TURN = 2 * math.pi

PICTURES = ("upright", "camera")
"""How a dataset's pictures lie: turned as the model sees them, or as the camera gives them to the robot."""

log = logging.getLogger("xr0_engine.data")

_FEATURE = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
_SLICE = re.compile(r"(\d{1,9})?:(\d{1,9})?")
LONGEST_COLUMNS = 20
"""Characters of `begin:end`."""


@dataclass(frozen=True)
class Selector:
    """Some columns of a LeRobot feature: `action`, `action[0:6]`, `action[waist, shoulder]`. picks: None = all."""

    feature: str
    picks: slice | tuple[str, ...] | None

    @staticmethod
    def parse(written: Any, where: str) -> Selector:
        match = _FEATURE.fullmatch(written.strip()) if isinstance(written, str) else None
        if match is None:
            raise DataError(
                f"{where}: expected a feature such as action, action[0:6] or action[waist], got {written!r:.80}"
            )
        inner = match[2]
        if inner is None:
            return Selector(match[1].strip(), None)
        bounds = _SLICE.fullmatch(inner.strip())
        if bounds:
            begin, end = (None if bound is None else int(bound) for bound in bounds.groups())
            return Selector(match[1].strip(), slice(begin, end))
        return Selector(match[1].strip(), tuple(name.strip() for name in inner.split(",")))

    def columns(self, names: Sequence[str], width: int) -> list[int]:
        """Which columns of a feature are meant. names: one per column, or empty. Raises DataError."""
        if self.picks is None:
            return list(range(width))
        if isinstance(self.picks, slice):
            if (self.picks.stop or 0) > width:
                raise DataError(f"{self.feature}[:{self.picks.stop}]: the feature has {width} columns")
            return list(range(width))[self.picks]
        return [self._column(name, names, width) for name in self.picks]

    def _column(self, name: str, names: Sequence[str], width: int) -> int:
        places = {place for place, other in enumerate(names) if other == name}
        if places and len(names) != width:
            raise DataError(
                f"{self.feature}[{name}]: the feature has {width} columns and {len(names)} names: pick by position"
            )
        if name.isdigit() and int(name) < width:
            places.add(int(name))
        if len(places) > 1:
            raise DataError(
                f"{self.feature}[{name}]: may be any of the columns {', '.join(map(str, sorted(places)))}, by position "
                f"or by name (named {', '.join(names)}): pick one by position, as {self.feature}[begin:end]"
            )
        if not places:
            raise DataError(f"{self.feature}[{name}]: the feature has {width} columns, named {', '.join(names) or '-'}")
        return places.pop()


@dataclass(frozen=True)
class PartMapping:
    """One part of an arm: where it is measured, where commanded, and for rotations how it is written.

    period: of joints whose angles wrap, in their own unit; None: they do not.
    """

    state: Selector
    action: Selector
    rotation: str = "matrix"
    period: float | None = None


@dataclass(frozen=True)
class ColumnMapping:
    """Columns of the model from columns of a feature; minus: what is subtracted, as it is at the observation.

    kind: one of KINDS; None: not said. period: of kind periodic, in the columns' own unit.
    """

    columns: slice
    source: Selector
    minus: Selector | None = None
    kind: str | None = None
    period: float = TURN

    @property
    def numbers(self) -> range:
        return range(self.columns.start, self.columns.stop)


@dataclass(frozen=True)
class Description:
    """folder: the dataset. views: view key -> video feature. arms, or state and action: as the layout is described by.

    These four are for LeRobot datasets only, and empty otherwise. pictures: one of PICTURES. width: columns of action
    and state.
    """

    folder: Path
    robot_type: str
    embodiment: Embodiment
    views: Mapping[str, str] = field(default_factory=dict)
    arms: Mapping[tuple[str, str], PartMapping] = field(default_factory=dict)
    state: tuple[ColumnMapping, ...] = ()
    action: tuple[ColumnMapping, ...] = ()
    pictures: str = "upright"
    width: int = COLUMNS

    def kind(self, entry: ColumnMapping, column: int) -> str | None:
        """One of KINDS: what an action column holds as its entry says, else the profile; None: neither does."""
        if entry.kind is not None or entry.minus is not None:
            return entry.kind or "absolute"
        steps, two_valued = self.embodiment.step_columns, self.embodiment.two_valued_columns
        if two_valued is not None and column in two_valued:
            return "two_valued"
        return None if steps is None else "step" if column in steps else "absolute"

    @property
    def stored_views(self) -> tuple[View, ...]:
        """The profile's views as the dataset's pictures are to be prepared: what lies upright is not turned again."""
        views = self.embodiment.views
        if self.pictures == "camera":
            return views
        return tuple(replace(view, rotate_180=False) for view in views)


def describe(path: Path) -> Description:
    """The description of a dataset folder, of a dataset of the hub by its id (hub.py), which is fetched, or of a YAML
    file that points to either. Raises DataError."""
    source = find_on_hub(path)
    if source is not None:
        return _of_hub(source)
    if path.suffix in (".yaml", ".yml"):
        return _read(path)
    if not path.is_dir():
        raise DataError(f"{path}: expected a dataset's folder, or a YAML file that describes one; there is neither")
    if (path / DESCRIPTION_FILE).is_file():
        return _read(path / DESCRIPTION_FILE)
    if (path / "meta" / "info.json").is_file():
        raise DataError(
            f"{path} is a LeRobot dataset without {DESCRIPTION_FILE}, which tells what its columns mean: docs/data.md"
        )
    return Description(path, DEFAULT_ROBOT_TYPE, embodiment_for(DEFAULT_ROBOT_TYPE))


def _of_hub(source: HubId) -> Description:
    folder = description_folder(source)
    own = folder / DESCRIPTION_FILE
    if not own.is_file():
        if (folder / "meta" / "info.json").is_file():
            raise DataError(
                f"{source} is a LeRobot dataset without {DESCRIPTION_FILE}, which tells what its columns mean: write "
                f"one of your own, with `dataset: {source.name}@{folder.name}` in it, and name that file instead "
                "(docs/data.md)"
            )
        raise DataError(
            f"{source} is no dataset that is read: it has neither meta/info.json, as LeRobot's have, nor "
            f"{DESCRIPTION_FILE}, which episode files need on the hub (`robot_type: {DEFAULT_ROBOT_TYPE}` will do)"
        )
    description = _read(own, is_on_hub=True)
    fetch_episodes(source, folder, description.views.values())
    return description


def _read(path: Path, is_on_hub: bool = False) -> Description:
    try:
        raw = read_yaml(path, DataError)
    except OSError as error:
        raise DataError(f"{path} cannot be read as YAML: {one_line(error)}") from None
    if not isinstance(raw, Mapping):
        raise DataError(f"{path}: expected a mapping of fields, got {raw!r:.80}")
    if is_on_hub and "dataset" in raw:
        raise DataError(f"{path}: dataset: expected none in a file of the hub, it describes what lies beside it")
    with reading(path, DataError):
        description = _build(path, raw)
    named = find_on_hub(Path(text(raw, "dataset", ".")), path.parent)
    if named is None:
        return description
    folder = description_folder(named)
    if not named.is_pinned:
        raise DataError(
            f"{path}: dataset: expected a commit, so that what this file says stays true: write "
            f"{named.name}@{folder.name}"
        )
    fetch_episodes(named, folder, description.views.values())
    return replace(description, folder=folder)


def _build(path: Path, raw: Mapping[str, Any]) -> Description:
    known = ("dataset", "robot_type", "embodiment", "views", "arms", "state", "action", "pictures", "width")
    _refuse_unknown(raw, known, "")
    robot_type = text(raw, "robot_type", DEFAULT_ROBOT_TYPE)
    if "embodiment" in raw:
        named = text(raw, "embodiment")
        beside = path.parent / named
        embodiment = load_embodiment(beside if beside.is_file() else named)
    else:
        embodiment = embodiment_for(robot_type)
    views = raw.get("views", {})
    wanted = [view.key for view in embodiment.views]
    # More cameras than the profile's do no harm, and another profile may name them; one in the place of another does.
    is_whole = isinstance(views, Mapping) and all(key in views for key in wanted)
    _refuse_unknown(views, [*wanted, *(views if is_whole else ())], "views")
    described_by = embodiment.action_layout.described_by
    found = [name for name in ("arms", "state", "action") if name in raw and name not in described_by]
    if found:
        raise ValueError(f"{found[0]}: not for layout {embodiment.layout!r} of embodiment {embodiment.name!r}")
    pictures = raw.get("pictures", PICTURES[0])
    width = _width(raw, embodiment)
    action = _columns(raw.get("action", []), "action", ("columns", "from", "minus", "kind", "period"), width)
    _compare_kinds(path, action, embodiment)
    if pictures not in PICTURES:
        raise ValueError(f"pictures: expected {' or '.join(PICTURES)}, got {pictures!r}")
    if "pictures" not in raw and any(view.rotate_180 for view in embodiment.views):
        _tell_that_upright(path, embodiment.name)
    return Description(
        folder=path.parent / text(raw, "dataset", "."),
        robot_type=robot_type,
        embodiment=embodiment,
        views={key: text(views, key) for key in views},
        arms=_arms(raw.get("arms", {})),
        state=_columns(raw.get("state", []), "state", ("columns", "from"), width),
        action=action,
        pictures=pictures,
        width=width,
    )


def _width(raw: Mapping[str, Any], embodiment: Embodiment) -> int:
    """A layout of named columns has as many as it has; others, what the description says."""
    layout = embodiment.action_layout
    named = MOBILE_COLUMNS if layout.mobile else COLUMNS if layout.columns else None
    width = raw.get("width", named or COLUMNS)
    if type(width) is not int or not 1 <= width <= MOST_COLUMNS or (named and width != named):
        expected = f"{named}, as layout {layout.name!r} has" if named else f"a whole number from 1 to {MOST_COLUMNS}"
        raise ValueError(f"width: expected {expected}, got {width!r:.40}")
    return width


@cache
def _tell_that_upright(path: Path, profile: str) -> None:
    """Once for each file, however often the dataset is opened."""
    log.warning(
        "%s: pictures: not given, so they are taken as upright and are not turned, though profile %s turns what its "
        "cameras give; write `pictures: upright` if that is right, `pictures: camera` if they are stored upside down",
        path,
        profile,
    )


def _arms(raw: Mapping[str, Any]) -> dict[tuple[str, str], PartMapping]:
    _refuse_unknown(raw, ("left", "right"), "arms")
    arms = {}
    for arm, parts in raw.items():
        _refuse_unknown(parts, (*PART_WIDTHS, "rotation"), f"arms.{arm}")
        for part, fields in parts.items():
            where = f"arms.{arm}.{part}"
            more = {"rotation": ("as",), "joints": ("kind", "period")}.get(part, ())
            _refuse_unknown(fields, ("state", "action", *more), where)
            written_as = fields.get("as", "matrix")
            if written_as not in ROTATIONS:
                raise ValueError(f"{where}.as: expected one of {', '.join(ROTATIONS)}, got {written_as!r}")
            kind, period = _kind(fields, where, ("absolute", "periodic"))
            state, action = (Selector.parse(fields.get(name), f"{where}.{name}") for name in ("state", "action"))
            arms[arm, part] = PartMapping(state, action, written_as, period if kind == "periodic" else None)
    return arms


def _kind(entry: Mapping[str, Any], where: str, known: Sequence[str]) -> tuple[str | None, float]:
    """An entry's kind, and the period that one of kind periodic has."""
    kind, period = entry.get("kind"), entry.get("period", TURN)
    if "kind" in entry and kind not in known:
        raise ValueError(f"{where}.kind: expected one of {', '.join(known)}, got {kind!r}")
    if "period" in entry and kind != "periodic":
        raise ValueError(f"{where}.period: expected only beside `kind: periodic`")
    if isinstance(period, bool) or not isinstance(period, int | float) or not 0 < period < math.inf:
        raise ValueError(f"{where}.period: expected a number above 0, got {period!r}")
    return kind, float(period)


def _compare_kinds(path: Path, action: Sequence[ColumnMapping], embodiment: Embodiment) -> None:
    """What a dataset says of its columns, with what the profile says. Raises ValueError if they differ."""
    for number, entry in enumerate(action):
        for column in entry.numbers:
            # None where the profile does not say.
            is_step, is_two_valued = (
                None if columns is None else column in columns
                for columns in (embodiment.step_columns, embodiment.two_valued_columns)
            )
            if entry.kind is None:
                if entry.minus is not None and (is_step or is_two_valued):
                    _tell_of_minus(path, f"action[{number}]", column, embodiment.name)
                continue
            # A profile that does not say is of no other opinion; two values may as well be called absolute.
            other_two = is_two_valued is (entry.kind != "two_valued") and entry.kind != "absolute"
            other_step = is_step is (entry.kind != "step")
            if other_step or other_two:
                raise ValueError(
                    f"action[{number}].kind: {entry.kind} for column {column}, but embodiment {embodiment.name!r} says "
                    f"step_columns {embodiment.step_columns}, two_valued_columns {embodiment.two_valued_columns}: mend "
                    "one of them, or give a profile of your own"
                )


@cache
def _tell_of_minus(path: Path, entry: str, column: int, profile: str) -> None:
    """Once for each file and entry."""
    log.warning(
        "%s: %s: `minus` beside column %d, which profile %s has among its step_columns or two_valued_columns: whoever "
        "executes the model must not go by that profile; give it one of its own",
        path,
        entry,
        column,
        profile,
    )


def _columns(raw: Any, where: str, known: Sequence[str], width: int) -> tuple[ColumnMapping, ...]:
    if not isinstance(raw, list):
        raise ValueError(f"{where}: expected a list of columns, got {raw!r:.80}")
    mappings = []
    taken = np.zeros(width, bool)
    for number, entry in enumerate(raw):
        at = f"{where}[{number}]"
        _refuse_unknown(entry, known, at)
        written = str(entry.get("columns"))[:LONGEST_COLUMNS]
        bounds = _SLICE.fullmatch(written) or re.fullmatch(r"(\d+)()", written)
        if bounds is None:
            raise ValueError(f"{at}.columns: expected a column or begin:end, got {written!r}")
        begin = int(bounds[1] or 0)
        end = begin + 1 if bounds.re is not _SLICE else int(bounds[2] or width)
        if not begin < end <= width or taken[begin:end].any():
            # YAML takes 6:8 for 6 minutes and 8 seconds.
            quote = "; write begin:end in quotes" if begin >= width and isinstance(entry["columns"], int) else ""
            raise ValueError(
                f"{at}.columns: expected columns of 0 to {width - 1} not mapped before, got {written!r}{quote}"
            )
        taken[begin:end] = True
        minus = Selector.parse(entry["minus"], f"{at}.minus") if "minus" in entry else None
        kind, period = _kind(entry, at, KINDS)
        if minus is not None and kind in ("step", "two_valued"):
            raise ValueError(f"{at}.minus: expected none beside `kind: {kind}`")
        source = Selector.parse(entry.get("from"), f"{at}.from")
        mappings.append(ColumnMapping(slice(begin, end), source, minus, kind, period))
    return tuple(mappings)


def _refuse_unknown(raw: Any, known: Iterable[str], where: str) -> None:
    prefix = f"{where}: " if where else ""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{prefix}expected a mapping with {', '.join(known)}, got {raw!r:.80}")
    unknown = [str(name) for name in raw if name not in known]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]!r} is unknown, expected {', '.join(known)}")
