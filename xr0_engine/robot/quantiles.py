"""Quantile statistics of actions and states, and reading tables of statistics (spec section 8).

NumPy only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from xr0_engine.files import table
from xr0_engine.part_configs import STEPS

QUANTILE_EPSILON = 1e-6
"""Added to the range of quantiles."""

# Where statistics name no active columns, one whose std is not above this does not move in the training data: the model
# neither sees nor sets it.
ACTIVE_STD = 1e-5

LARGEST = 1e9
"""Of a mean or std, in the robot's units: encoders of 24 bits count to 2e7. What float32 can hold, but an action of
twice the std cannot, would make actions infinite."""

POST_TRAINING_RULE, ROBODOJO_RULE = "post_training", "robodojo"
STATE_RULES = (POST_TRAINING_RULE, ROBODOJO_RULE)

ACTION_QUANTILES = ("action_q01", "action_q99")
"""Of a robot type's actions, in its entry. Plain `q01` and `q99` beside mean and std are the states' in the released
configurations and were the actions' in files of our own, so no entry goes by them."""


@dataclass(frozen=True, eq=False)
class Quantiles:
    """q01, q99: (rows, columns) float64, robot units, one row or one for each timestep. columns: those that go by them.
    One whose range is not above ACTIVE_STD passes as it is, both ways."""

    q01: np.ndarray
    q99: np.ndarray
    columns: tuple[int, ...]

    def half_range(self) -> np.ndarray:
        """(rows, columns): of a column that passes as it is, 1."""
        full = (self.q99 + QUANTILE_EPSILON) - self.q01
        return np.where(full > ACTIVE_STD, full / 2, 1.0)

    def middle(self) -> np.ndarray:
        full = (self.q99 + QUANTILE_EPSILON) - self.q01
        return np.where(full > ACTIVE_STD, self.q01 + full / 2, 0.0)

    def placed(self, others: np.ndarray, own: np.ndarray) -> np.ndarray:
        """own in this object's columns of a copy of others."""
        table = others.copy()
        table[..., list(self.columns)] = np.broadcast_to(own, others.shape)[..., list(self.columns)]
        return table

    def to_json(self) -> dict[str, Any]:
        tables = dict(zip(ACTION_QUANTILES, (self.q01.tolist(), self.q99.tolist()), strict=True))
        return {**tables, "quantile_columns": list(self.columns)}


@dataclass(frozen=True, eq=False)
class StateStatistics:
    """How one robot type's states become the model's, in float64 (spec section 8).

    rule: `post_training`: to [-1, 1] by quantiles, clipped, 0 where q99 is not above q01; or `robodojo`: not clipped,
    and what does not move passes as it is. q01, q99: (S,) float64. mean, std, by_mean: rule robodojo alone, the columns
    that go by mean and standard deviation instead.
    """

    rule: str
    q01: np.ndarray
    q99: np.ndarray
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    by_mean: tuple[int, ...] = ()

    def normalize(self, states: np.ndarray) -> np.ndarray:
        """states: (..., S), robot units. Returns the same shape, float64."""
        given = np.asarray(states, np.float64)
        if self.rule == POST_TRAINING_RULE:
            scaled = 2 * (given - self.q01) / (self.q99 - self.q01 + QUANTILE_EPSILON) - 1
            return np.clip(np.where(self.q99 <= self.q01, 0, scaled), -1, 1)
        full = (self.q99 + QUANTILE_EPSILON) - self.q01
        moves = full > ACTIVE_STD
        normalized = np.where(moves, 2 * (given - self.q01) / np.where(moves, full, 1) - 1, given)
        if self.mean is not None and self.std is not None:
            columns = list(self.by_mean)
            std = self.std[columns]
            moves = std > ACTIVE_STD
            by_mean = (given[..., columns] - self.mean[columns]) / np.where(moves, std + QUANTILE_EPSILON, 1)
            normalized[..., columns] = np.where(moves, by_mean, given[..., columns])
        return normalized

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"rule": self.rule, "q01": self.q01.tolist(), "q99": self.q99.tolist()}
        if self.mean is not None and self.std is not None:
            told |= {"mean": self.mean.tolist(), "std": self.std.tolist(), "by_mean": list(self.by_mean)}
        return told


def read_state(raw: Any) -> StateStatistics:
    """Of a robot type's entry `state`. Raises ValueError that says what is wrong."""
    if not isinstance(raw, dict) or raw.get("rule") not in STATE_RULES:
        raise ValueError(f"state: expected a mapping with rule {' or '.join(STATE_RULES)}, q01 and q99")
    try:
        width = table([raw["q01"]], "q01").shape[1]
        q01, q99 = (read_table(name, [raw[name]], width)[0] for name in ("q01", "q99"))
        if raw.get("by_mean") is None:
            return StateStatistics(raw["rule"], q01, q99)
        if raw["rule"] != ROBODOJO_RULE:
            raise ValueError(f"by_mean: expected with rule {ROBODOJO_RULE} alone")
        mean, std = (read_table(name, [raw[name]], width)[0] for name in ("mean", "std"))
        return StateStatistics(raw["rule"], q01, q99, mean, std, _columns(raw, "by_mean", width))
    except KeyError as error:
        raise ValueError(f"state: {error.args[0]} is missing") from None
    except ValueError as error:
        raise ValueError(f"state, {error}") from None


def read_quantiles(raw: Mapping[str, Any], width: int, timesteps: int) -> Quantiles:
    """Of a robot type's entry with `quantile_columns`. Raises ValueError that says what is wrong."""
    missing = [name for name in ACTION_QUANTILES if name not in raw]
    if missing:
        raise ValueError(f"quantile_columns: {' and '.join(missing)} missing")
    q01, q99 = (read_table(name, raw[name], width) for name in ACTION_QUANTILES)
    if q01.shape != q99.shape or len(q01) not in (1, timesteps):
        raise ValueError(
            f"{', '.join(ACTION_QUANTILES)}: expected 1 or {timesteps} timesteps each, got {len(q01)} and {len(q99)}"
        )
    return Quantiles(q01, q99, _columns(raw, "quantile_columns", width))


def _columns(raw: Mapping[str, Any], name: str, width: int) -> tuple[int, ...]:
    columns = raw[name]
    if not isinstance(columns, list) or not all(type(column) is int and 0 <= column < width for column in columns):
        raise ValueError(f"{name}: expected a list of column numbers from 0 to {width - 1}, got {columns!r:.80}")
    return tuple(sorted(set(columns)))


def refuse_unowned(raw: Mapping[str, Any]) -> None:
    """Raises ValueError for an entry whose quantiles do not say what they are of. With `state`, which says it of the
    states, and without columns that go by them, they are of no use, as in files that `xr0 data stats` once wrote."""
    plain = [name for name in ("q01", "q99") if raw.get(name) is not None]
    if plain and (raw.get("state") is None or raw.get("quantile_columns") is not None):
        raise ValueError(
            f"{' and '.join(plain)} beside mean and std: expected to know of what: put those of states into `state` "
            f"({{rule, q01, q99}}), and call those of actions {' and '.join(ACTION_QUANTILES)}, or leave them out: "
            "states then enter as they are"
        )


def read_table(name: str, raw: Any, width: int) -> np.ndarray:
    """(rows, width) float64, finite, of a size that statistics have. Raises ValueError for anything else."""
    numbers = table(raw, name)
    if len(numbers) == 0 or numbers.shape[1] != width:
        other = f": the model has {width} columns, these are statistics for another" if len(numbers) else ""
        raise ValueError(f"{name}: expected shape (T, {width}), got {numbers.shape}{other}")
    if len(numbers) > STEPS[1]:
        raise ValueError(f"{name}: expected at most {STEPS[1]} timesteps, got {len(numbers)}")
    if np.abs(numbers).max() > LARGEST:
        raise ValueError(f"{name}: expected values up to {LARGEST:g}, got {np.abs(numbers).max():g}")
    return numbers
