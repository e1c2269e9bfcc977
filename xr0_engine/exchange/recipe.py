"""What a released run says of itself, and action statistics of any source, as plain values; no code is run.

The released training writes its configuration into the run's folder as `config.py` (assignments of `dict(...)` calls
and literals) and its server reads mean and std from there: `data.params.train_datasets`. The same in `config.yaml`, or
in a data configuration such as `configs/data/earphone.yaml`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xr0_engine.files import YAML_BYTES, read_bytes, read_json, read_yaml
from xr0_engine.types import CheckpointError

RECIPE_FILES = ("config.py", "config.yaml")
"""The first is what the released server reads."""
STATISTICS_PLACE = ("data", "params", "train_datasets")
QUANTILES = ("q01", "q99")
"""Of states, though they stand beside mean and std of actions: XR-1's data configurations have them."""
RELEASED_STATE = "released_state"
"""Key of statistics_of: what a released configuration holds for whatever code reads it. An entry's own `state` is asked
for."""
MODEL_PLACE = ("model", "params", "model")


@dataclass(frozen=True)
class Recipe:
    """file: where it stands. values: what it says, nested as there."""

    file: Path
    values: Mapping[str, Any]

    @property
    def model(self) -> Mapping[str, Any]:
        """The model's settings: async_train, local_window, ..."""
        return _at(self.values, MODEL_PLACE)

    @property
    def has_statistics(self) -> bool:
        """Whether mean and std stand where the post-training code has them."""
        place = _at(self.values, STATISTICS_PLACE)
        return place.get("mean") is not None and place.get("std") is not None

    @property
    def state_length(self) -> int | None:
        """States of an observation, where the model's settings or the data's tell it."""
        told = [_at(self.values, place).get("state_length") for place in (MODEL_PLACE, STATISTICS_PLACE)]
        return next((value for value in told if type(value) is int and value > 0), None)


def find_recipe(weights: Path) -> Recipe | None:
    """The configuration of the run that a file of weights belongs to: beside it, or up to three folders above.

    Raises CheckpointError for one that cannot be read.
    """
    for folder in list(weights.resolve().parents)[:4]:
        for name in RECIPE_FILES:
            if (folder / name).is_file():
                return Recipe(folder / name, _read_values(folder / name))
    return None


def read_action_config(file: Path, robot_type: str | None) -> dict[str, Any]:
    """Robot type -> {mean, std, ...} of a file: a preprocessor_config.json, what `xr0 data stats` writes, or a released
    configuration (YAML, or Python of literals). The entries' own form is not checked.

    robot_type: the name for statistics that have none; of several, the one that is wanted (None: all). Raises
    CheckpointError, or ValueError if a name is missing or unknown.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no file {file} of action statistics")
    values = read_json(file) if file.suffix == ".json" else _read_values(file)
    named = values.get("action_config") if isinstance(values, Mapping) else None
    if isinstance(named, Mapping) and named:
        for name, entry in named.items():
            if isinstance(entry, Mapping) and RELEASED_STATE in entry:
                raise CheckpointError(f"{file}: action_config: {name}: {RELEASED_STATE} is unknown: is state meant?")
        if robot_type is None:
            return dict(named)
        if robot_type not in named:
            raise ValueError(f"robot_type: {file} holds {', '.join(map(str, named))}, not {robot_type!r}")
        return {robot_type: named[robot_type]}
    return {_named(file, robot_type): statistics_of(file, values)}


def statistics_of(file: Path, values: Any) -> dict[str, Any]:
    """{mean, std} of a released configuration, or of a file that holds nothing else; and if QUANTILES are there,
    RELEASED_STATE, which lacks the rule that they are used by.

    Raises CheckpointError.
    """
    place = _at(values, STATISTICS_PLACE)
    if not place:
        place = values if isinstance(values, Mapping) else {}
    missing = [name for name in ("mean", "std") if place.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{file} holds no action statistics: no `action_config`, and no {' and '.join(missing)} in "
            f"{'.'.join(STATISTICS_PLACE)}: give --statistics FILE, as `xr0 data stats` writes it (a RoboDojo run's "
            "tables, which are those of its transforms of type Normalize: docs/training.md)"
        )
    if place.get("active_parts") is not None:
        raise CheckpointError(
            f"{file}: {'.'.join(STATISTICS_PLACE)}.active_parts is unknown to the released training, which always uses "
            "26 columns: give --statistics FILE with `active_columns`, a list of column numbers, beside mean and std"
        )
    found = {name: _numbers(place[name]) for name in ("mean", "std")}
    told = {name: _row(_numbers(place[name])) for name in QUANTILES if place.get(name) is not None}
    return {**found, RELEASED_STATE: told} if told else found


def _row(table: Any) -> Any:
    """Of states, which released statistics have as a row in a list."""
    return table[0] if isinstance(table, list) and len(table) == 1 and isinstance(table[0], list) else table


def _named(file: Path, robot_type: str | None) -> str:
    if not robot_type:
        raise ValueError(
            f"robot_type: {file} names no robot: give --robot-type, the name that observations will carry "
            "(bimanual has the profile of the released post-training built in)"
        )
    return robot_type


def _numbers(table: Any) -> Any:
    """YAML takes 1e-06, which has no point, for text."""
    if isinstance(table, list):
        return [_numbers(item) for item in table]
    try:
        return float(table) if isinstance(table, str) else table
    except ValueError:
        return table


def _at(values: Any, place: tuple[str, ...]) -> Mapping[str, Any]:
    for key in place:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _read_values(file: Path) -> Any:
    if file.suffix == ".py":
        return _literals(file, read_bytes(file, most_bytes=YAML_BYTES).decode("utf-8", errors="replace"))
    return read_yaml(file, CheckpointError)


def _literals(file: Path, text: str) -> dict[str, Any]:
    """A Python file's assignments of literals and `dict(...)`; what else it holds is left out, and never run."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{file} is no Python of plain values: {error}") from None
    values = {}
    for node in body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _literal(node.value)
    return values


def _literal(node: ast.expr) -> Any:
    """None for an expression that is no plain value."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords if keyword.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
