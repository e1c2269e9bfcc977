"""A LeRobot dataset's columns as a motion: what its description maps, brought to the robot's ticks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from xr0_engine.robot.decode import LEFT, RIGHT, rotation_exp
from xr0_engine.training.data.description import COLUMNS, ColumnMapping, Description, PartMapping, Selector
from xr0_engine.training.data.episode import PARTS, part_columns, poses_of
from xr0_engine.training.data.motion import BimanualMotion, Motion, PlainMotion
from xr0_engine.training.data.samples import DataError

# Angles that wrap stay within their period, up to noise.
PERIOD_SLACK = 1.01

Pick = Callable[[Selector], np.ndarray]
"""Columns of a dataset -> their values, (N, k) float64, row by row."""


@dataclass(frozen=True, eq=False)
class Timing:
    """When rows and ticks are. ticks: (ticks,) int64, the row nearest to each. times_s: (N,), of the rows, rising, 0 at
    the first tick. rate_hz, tick_hz: of the rows and of the ticks."""

    ticks: np.ndarray
    times_s: np.ndarray
    rate_hz: float
    tick_hz: float


def motion_of(description: Description, pick: Pick, timing: Timing) -> Motion:
    """The motion of an episode. Raises DataError that names the entry of the description, or what pick raises."""
    if description.arms:
        return _bimanual_motion(description, pick, timing.ticks)
    ticks = timing.ticks
    states, targets, origins = np.zeros((3, len(ticks), description.width))
    columns = np.zeros(description.width, bool)
    for entry in description.state:
        states[:, entry.columns] = pick(entry.source)[ticks]
    for number, entry in enumerate(description.action):
        columns[entry.columns] = True
        values = pick(entry.source)
        minus = None if entry.minus is None else pick(entry.minus)
        for place, column in enumerate(entry.numbers):
            try:
                targets[:, column], origins[:, column] = column_targets(
                    entry,
                    description.kind(entry, column),
                    values[:, place],
                    None if minus is None else minus[:, place],
                    timing,
                )
            except ValueError as error:
                raise DataError(f"action[{number}], column {column}: {error}") from None
    return PlainMotion(states.astype(np.float32), targets, origins, columns)


def column_targets(
    entry: ColumnMapping, kind: str | None, values: np.ndarray, minus: np.ndarray | None, timing: Timing
) -> tuple[np.ndarray, np.ndarray]:
    """An action column at the ticks: its targets, and what is subtracted where a tick is the observation's.

    kind: what it holds; see Description.kind. values, minus: (N,), row by row. Returns (ticks,) float64 twice. A
    periodic column goes on without a jump from its value at the observation, or from the one nearest to `minus`. Raises
    ValueError for values that are not of the entry's kind.
    """
    if entry.kind is not None:
        _check_kind(entry.kind, values, entry.period)
    ticks = timing.ticks
    if kind == "step":
        return _steps(values, timing), np.zeros(len(ticks))
    origins = np.zeros(len(ticks)) if minus is None else minus[ticks]
    if kind != "periodic":
        return values[ticks], origins
    targets = np.unwrap(values, period=entry.period)[ticks]
    begins = values[ticks] if minus is None else origins
    return targets, origins + entry.period * np.round((targets - begins) / entry.period)


def _steps(steps: np.ndarray, timing: Timing) -> np.ndarray:
    """Steps (N,) of rows as steps (ticks,) of ticks, which add up to the recorded motion.

    Each is made evenly over the time of its row. Turns are added up as vectors, which is exact where the axis stays and
    off by half the product of two turns where it does not. Where rows are missing, the rates are equal, and no chunk
    goes on over them.
    """
    if timing.rate_hz == timing.tick_hz:
        return steps[timing.ticks]
    times_s, row_s = timing.times_s, 1 / timing.rate_hz
    moved = np.append(0.0, np.cumsum(steps))
    bounds_s = np.arange(len(timing.ticks) + 1) / timing.tick_hz
    made: np.ndarray = np.diff(np.interp(bounds_s, np.append(times_s, times_s[-1] + row_s), moved))
    return made


def _check_kind(kind: str, values: np.ndarray, period: float) -> None:
    found = np.unique(values)
    if kind == "two_valued" and len(found) > 2:
        raise ValueError(
            f"kind two_valued: expected at most 2 values, got {len(found)}: `kind: absolute` takes them as they are"
        )
    if kind == "periodic" and np.ptp(values) > PERIOD_SLACK * period:
        raise ValueError(
            f"kind periodic: expected values within one period of {period:.6g}, got {found[0]:.6g} to {found[-1]:.6g}: "
            "give the `period` in their unit (360 for degrees), or leave the kind out if they do not wrap"
        )


def _bimanual_motion(description: Description, pick: Pick, ticks: np.ndarray) -> BimanualMotion:
    parts: list[dict[tuple[str, str], np.ndarray]] = [{}, {}]
    periods: dict[int, float] = {}
    for key, mapping in description.arms.items():
        for values, picked in zip(parts, _part(key, mapping, pick), strict=True):
            values[key] = picked[ticks]
        if mapping.period is not None:
            columns = (LEFT if key[0] == "left" else RIGHT).joints
            periods |= dict.fromkeys(range(COLUMNS)[columns], mapping.period)
    present = {(arm, part): (arm, part) in description.arms for arm in ("left", "right") for part in PARTS}
    proprios, targets = (poses_of(values, len(ticks)) for values in parts)
    return BimanualMotion(proprios, targets, part_columns(present), periods)


def _part(key: tuple[str, str], mapping: PartMapping, pick: Pick) -> tuple[np.ndarray, np.ndarray]:
    """One part of an arm as it is measured and as it is commanded, row by row."""
    state, action = pick(mapping.state), pick(mapping.action)
    if key[1] == "rotation":
        return _matrices(state, mapping.rotation), _matrices(action, mapping.rotation)
    if mapping.period is None:
        return state, action
    for values in (*state.T, *action.T):
        try:
            _check_kind("periodic", values, mapping.period)
        except ValueError as error:
            raise DataError(f"arms.{key[0]}.{key[1]}: {error}") from None
    # The state stays as the robot reports it.
    return state, np.unwrap(action, axis=0, period=mapping.period)


def _matrices(values: np.ndarray, written_as: str) -> np.ndarray:
    """Rotations (N, k) as matrices, (N, 9) row by row."""
    if written_as == "matrix":
        return values
    if written_as == "axis_angle":
        return rotation_exp(values).reshape(-1, 9)
    w, x, y, z = np.moveaxis(values if written_as == "quaternion_wxyz" else np.roll(values, 1, axis=1), 1, 0)
    norm = np.sqrt(w**2 + x**2 + y**2 + z**2)
    if (norm == 0).any():
        raise DataError(f"frame {np.flatnonzero(norm == 0)[0]}: expected a quaternion, got zeros")
    w, x, y, z = w / norm, x / norm, y / norm, z / norm
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return np.stack([value for row in rows for value in row], axis=1)
