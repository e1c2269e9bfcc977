"""What a dataset is of: xr0.yaml in its folder, or a YAML file elsewhere that points to it (docs/data.md).

For LeRobot datasets, whose columns are each robot's own, it also says which of them are which of the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from xr0_engine.robot.embodiment import Embodiment, embodiment_for, load_embodiment
from xr0_engine.training.data.samples import DataError

DESCRIPTION_FILE = "xr0.yaml"
# The robot type of episode files that come without a description: the only one that their format can hold.
DEFAULT_ROBOT_TYPE = "bimanual"
COLUMNS = 32
"""Columns of the model's action and state."""

ROTATIONS = {"matrix": 9, "axis_angle": 3, "quaternion_xyzw": 4, "quaternion_wxyz": 4}
PART_WIDTHS = {"position": 3, "joints": 6, "gripper": 1}

_FEATURE = re.compile(r"([^\[\]]+)(?:\[([^\[\]]*)\])?")
_SLICE = re.compile(r"(\d+)?:(\d+)?")


@dataclass(frozen=True)
class Selector:
    """Some columns of a LeRobot feature: `action`, `action[0:6]`, `action[waist, shoulder]`. picks: None = all."""

    feature: str
    picks: slice | tuple[str, ...] | None

    @staticmethod
    def parse(text: Any, where: str) -> Selector:
        match = _FEATURE.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            raise DataError(f"{where}: expected a feature such as action, action[0:6] or action[waist], got {text!r}")
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
        found = []
        for name in self.picks:
            if name.isdigit() and int(name) < width:
                found.append(int(name))
            elif name in names:
                found.append(list(names).index(name))
            else:
                raise DataError(
                    f"{self.feature}[{name}]: the feature has {width} columns, named {', '.join(names) or '-'}"
                )
        return found


@dataclass(frozen=True)
class PartMapping:
    """One part of an arm: where it is measured, where commanded, and for rotations how it is written."""

    state: Selector
    action: Selector
    rotation: str = "matrix"


@dataclass(frozen=True)
class ColumnMapping:
    """Columns of the model from columns of a feature; minus: what is subtracted, as it is at the observation."""

    columns: slice
    source: Selector
    minus: Selector | None = None


@dataclass(frozen=True)
class Description:
    """folder: the dataset. views: view key -> video feature. arms, or state and action: as the layout is described by.

    The last four are for LeRobot datasets only, and empty otherwise.
    """

    folder: Path
    robot_type: str
    embodiment: Embodiment
    views: Mapping[str, str] = field(default_factory=dict)
    arms: Mapping[tuple[str, str], PartMapping] = field(default_factory=dict)
    state: tuple[ColumnMapping, ...] = ()
    action: tuple[ColumnMapping, ...] = ()


def describe(path: Path) -> Description:
    """The description of a dataset folder, or of a YAML file that points to one. Raises DataError."""
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


def _read(path: Path) -> Description:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise DataError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(raw, Mapping):
        raise DataError(f"{path}: expected a mapping of fields, got {raw!r}")
    try:
        return _build(path, raw)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _build(path: Path, raw: Mapping[str, Any]) -> Description:
    _refuse_unknown(raw, ("dataset", "robot_type", "embodiment", "views", "arms", "state", "action"), "")
    robot_type = raw.get("robot_type", DEFAULT_ROBOT_TYPE)
    if "embodiment" in raw:
        beside = path.parent / str(raw["embodiment"])
        embodiment = load_embodiment(beside if beside.is_file() else raw["embodiment"])
    else:
        embodiment = embodiment_for(robot_type)
    views = raw.get("views", {})
    _refuse_unknown(views, [view.key for view in embodiment.views], "views")
    described_by = embodiment.action_layout.described_by
    found = [name for name in ("arms", "state", "action") if name in raw and name not in described_by]
    if found:
        raise ValueError(f"{found[0]}: not for layout {embodiment.layout!r} of embodiment {embodiment.name!r}")
    return Description(
        folder=path.parent / raw.get("dataset", "."),
        robot_type=robot_type,
        embodiment=embodiment,
        views=dict(views),
        arms=_arms(raw.get("arms", {})),
        state=_columns(raw.get("state", []), "state", ("columns", "from")),
        action=_columns(raw.get("action", []), "action", ("columns", "from", "minus")),
    )


def _arms(raw: Mapping[str, Any]) -> dict[tuple[str, str], PartMapping]:
    _refuse_unknown(raw, ("left", "right"), "arms")
    arms = {}
    for arm, parts in raw.items():
        _refuse_unknown(parts, (*PART_WIDTHS, "rotation"), f"arms.{arm}")
        for part, fields in parts.items():
            where = f"arms.{arm}.{part}"
            _refuse_unknown(fields, ("state", "action", *(["as"] if part == "rotation" else [])), where)
            kind = fields.get("as", "matrix")
            if kind not in ROTATIONS:
                raise ValueError(f"{where}.as: expected one of {', '.join(ROTATIONS)}, got {kind!r}")
            state, action = (Selector.parse(fields.get(name), f"{where}.{name}") for name in ("state", "action"))
            arms[arm, part] = PartMapping(state, action, kind)
    return arms


def _columns(raw: Any, where: str, known: Sequence[str]) -> tuple[ColumnMapping, ...]:
    if not isinstance(raw, list):
        raise ValueError(f"{where}: expected a list of columns, got {raw!r}")
    mappings = []
    taken = np.zeros(COLUMNS, bool)
    for number, entry in enumerate(raw):
        at = f"{where}[{number}]"
        _refuse_unknown(entry, known, at)
        text = str(entry.get("columns"))
        bounds = _SLICE.fullmatch(text) or re.fullmatch(r"(\d+)()", text)
        if bounds is None:
            raise ValueError(f"{at}.columns: expected a column or begin:end, got {text!r}")
        begin = int(bounds[1] or 0)
        end = begin + 1 if bounds.re is not _SLICE else int(bounds[2] or COLUMNS)
        if not begin < end <= COLUMNS or taken[begin:end].any():
            raise ValueError(f"{at}.columns: expected columns of 0 to {COLUMNS - 1} not mapped before, got {text!r}")
        taken[begin:end] = True
        minus = Selector.parse(entry["minus"], f"{at}.minus") if "minus" in entry else None
        mappings.append(ColumnMapping(slice(begin, end), Selector.parse(entry.get("from"), f"{at}.from"), minus))
    return tuple(mappings)


def _refuse_unknown(raw: Any, known: Iterable[str], where: str) -> None:
    prefix = f"{where}: " if where else ""
    if not isinstance(raw, Mapping):
        raise ValueError(f"{prefix}expected a mapping with {', '.join(known)}, got {raw!r}")
    unknown = [str(name) for name in raw if name not in known]
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]!r} is unknown, expected {', '.join(known)}")
