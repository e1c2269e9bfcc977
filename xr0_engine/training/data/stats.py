"""Action statistics over all training windows: mean and std per timestep and column, in float64 (spec section 4.1)."""

from __future__ import annotations

import json
import logging
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.files import read_json
from xr0_engine.robot.normalize import ACTIVE_STD
from xr0_engine.robot.quantiles import ACTION_QUANTILES, StateStatistics
from xr0_engine.training.data.parallel import in_parallel
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.sources import Source, checked_instructions, open_source, split
from xr0_engine.training.data.windows import chunk_at
from xr0_engine.whole import write_whole

log = logging.getLogger("xr0_engine.data")

# Windows held in memory at once.
BLOCK = 512
QUANTILES = (0.01, 0.99)
QUANTILE_ROWS = 1 << 20
"""Values of a column that quantiles are taken over at most: their rank is then off by a hundredth of itself."""

QuantilePair = tuple[np.ndarray, np.ndarray]
"""q01 and q99, (columns,) float64 each."""


@dataclass(frozen=True, eq=False)
class Moments:
    """What is known of some windows. count, mean, squares: (T, A); squares: sum of squared distances from the mean."""

    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray

    @staticmethod
    def of(actions: np.ndarray, mask: np.ndarray) -> Moments:
        """Of windows (W, T, A); what the mask leaves out does not count."""
        count = mask.sum(axis=0)
        safe = np.maximum(count, 1)
        mean = np.where(mask, actions, 0).sum(axis=0) / safe
        return Moments(count, mean, np.where(mask, (actions - mean) ** 2, 0).sum(axis=0))

    def __add__(self, other: Moments) -> Moments:
        """Of both together. No sum of squares is ever subtracted from another, so nothing cancels."""
        count = self.count + other.count
        safe = np.maximum(count, 1)
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / safe)
        return Moments(count, mean, self.squares + other.squares + apart**2 * (self.count * other.count / safe))

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self.squares / np.maximum(self.count, 1))


@dataclass(frozen=True, eq=False)
class Statistics:
    """mean, std: (T, A) float64, robot units; 0 for columns that the robot does not have. windows: how many. actions,
    states: quantiles, if they were asked for.

    active_columns: those of the layout that any window has (ActionStatistics); None for a layout that names none.
    """

    robot_type: str
    mean: np.ndarray
    std: np.ndarray
    windows: int
    episodes: int
    active_columns: tuple[int, ...] | None = None
    actions: QuantilePair | None = None
    states: QuantilePair | None = None


@dataclass(frozen=True, eq=False)
class _Part:
    """Of an episode. actions: (n, A) and states: (m, S), float64, some of them, NaN where unsupervised."""

    moments: Moments
    actions: np.ndarray
    states: np.ndarray


def compute(
    paths: Sequence[Path],
    chunk_length: int,
    validation_fraction: float,
    processes: int,
    skip_broken: bool = False,
    quantiles: bool = False,
) -> Statistics:
    """Statistics of the training windows of one robot's datasets. Exactly the same for any number of processes.

    skip_broken: leave out, with a warning, the episodes whose motion or task cannot be used, as training does.
    quantiles: also those of actions and states, over evenly spread windows where there are more than QUANTILE_ROWS
    values of a column. Raises DataError for a dataset that cannot be read, or none of whose episodes is as long as the
    chunk, and ValueError for datasets of several robot types.
    """
    sources = [open_source(path, skip_broken) for path in paths]
    robot_types = sorted({source.description.robot_type for source in sources})
    if len(robot_types) != 1:
        raise ValueError(f"datasets: expected one robot type, got {', '.join(robot_types)}: one call for each")
    parts, windows, episodes = [], 0, 0
    values: list[_Part] = []
    ticks = sum(sum(source.lengths[number] for number in split(source, validation_fraction)[0]) for source in sources)
    every = max(1, -(-ticks * chunk_length // QUANTILE_ROWS)) if quantiles else None
    for path, source in zip(paths, sources, strict=True):
        train = split(source, validation_fraction)[0]
        if not train:
            raise DataError(f"{path}: nothing to train on: every episode is invalid")
        if max(source.lengths[number] for number in train) < chunk_length:
            raise DataError(f"{path}: no episode has the {chunk_length} steps of a chunk")
        read = partial(_episode, source, chunk_length, skip_broken, every)
        found = list(in_parallel(read, train, processes, str(path)))
        kept = [number for number, one in zip(train, found, strict=True) if one is not None]
        if not kept:
            raise DataError(f"{path}: nothing to train on: every episode is broken; run xr0 data check")
        values += [one for one in found if one is not None]
        parts.append(_sum(one.moments for one in found if one is not None))
        windows += sum(source.lengths[number] for number in kept)
        episodes += len(kept)
    total = _sum(parts)
    columns = sources[0].description.embodiment.action_layout.active_columns
    if columns is not None:
        # A part that no episode reports is none of this robot's: left active, it would be noise that nothing teaches.
        columns = tuple(column for column in columns if total.count[:, column].any())
    pairs = [
        _quantiles([getattr(one, name) for one in values]) if quantiles else None for name in ("actions", "states")
    ]
    return Statistics(robot_types[0], total.mean, total.std, windows, episodes, columns, *pairs)


def _quantiles(parts: list[np.ndarray]) -> QuantilePair:
    """Of columns without a value: 0 and 0, so that they are never divided by."""
    values = np.concatenate(parts)
    pair = np.zeros((2, values.shape[1]))
    for column in range(values.shape[1]):
        known = values[~np.isnan(values[:, column]), column]
        if len(known):
            pair[:, column] = np.quantile(known, QUANTILES)
    return pair[0], pair[1]


def merge(file: Path, statistics: Statistics, replace: bool) -> None:
    """Write the statistics into a preprocessor_config.json, new or there, beside those of other robot types.

    A robot type that the file has already is only replaced if asked, and only by the same robot: same chunk length,
    same active columns. Raises ValueError otherwise; the file changes whole or not at all.
    """
    raw: dict[str, Any] = {}
    if file.exists():
        raw = read_json(file)
        known = raw.get("action_config", {}) if isinstance(raw, dict) else None
        if not isinstance(known, dict) or not all(isinstance(it, dict) and "std" in it for it in known.values()):
            raise ValueError(f"{file}: expected a JSON object with action_config: {{robot type: {{mean, std}}}}")
    known = raw.setdefault("action_config", {})
    name = statistics.robot_type
    if name in known:
        _refuse_another(file, name, known[name], statistics)
        if not replace:
            raise ValueError(f"{file} has statistics of {name!r} already: --replace puts these in their place")
    known[name] = {"mean": statistics.mean.tolist(), "std": statistics.std.tolist()}
    if statistics.active_columns is not None:
        known[name]["active_columns"] = list(statistics.active_columns)
    if statistics.actions is not None and statistics.states is not None:
        # The actions' are for whoever goes by quantiles, the states' are in use.
        known[name] |= {key: [row.tolist()] for key, row in zip(ACTION_QUANTILES, statistics.actions, strict=True)}
        known[name]["state"] = StateStatistics("post_training", *statistics.states).to_json()
    write_whole(file, json.dumps(raw))


def _refuse_another(file: Path, name: str, known: dict[str, Any], statistics: Statistics) -> None:
    old, new = np.asarray(known["std"]), statistics.std
    if old.shape != new.shape:
        raise ValueError(
            f"{file}: {name!r} has chunks of {len(old)} steps there, these have {len(new)}: "
            "give this robot type a name of its own"
        )
    listed, own = known.get("active_columns"), statistics.active_columns
    if listed is None or own is None:
        # Statistics of older files name none.
        old_columns, new_columns = (set(np.flatnonzero((std > ACTIVE_STD).any(axis=0)).tolist()) for std in (old, new))
    else:
        old_columns, new_columns = set(map(int, listed)), set(own)
    if old_columns != new_columns:
        raise ValueError(
            f"{file}: {name!r} is another robot there, columns {sorted(old_columns ^ new_columns)} move in one of them "
            "only: give this robot type a name of its own"
        )


def _episode(source: Source, chunk_length: int, skip_broken: bool, every: int | None, number: int) -> _Part | None:
    """every: n-th window is kept for quantiles; None: none is. None: it is broken, and is left out."""
    try:
        episode = source.load(number)
        if skip_broken:
            checked_instructions(episode)
    except DataError as error:
        if not skip_broken:
            raise
        log.warning("left out: %s", error)
        return None
    blocks = (range(begin, min(begin + BLOCK, len(episode.motion))) for begin in range(0, len(episode.motion), BLOCK))
    moments = _sum(_block([chunk_at(episode, tick, chunk_length) for tick in block]) for block in blocks)
    kept = range(0, len(episode.motion), every) if every else range(0)
    states = [episode.motion.state(tick)[-1] for tick in kept]
    chunks = [chunk_at(episode, tick, chunk_length) for tick in kept]
    actions = [np.where(chunk.mask, chunk.actions, np.nan) for chunk in chunks]
    none = np.zeros((0, len(episode.motion.columns)))
    return _Part(moments, np.concatenate([none, *actions]), np.stack(states).astype(np.float64) if states else none)


def _block(chunks: list[Any]) -> Moments:
    return Moments.of(np.stack([chunk.actions for chunk in chunks]), np.stack([chunk.mask for chunk in chunks]))


def _sum(parts: Iterable[Moments]) -> Moments:
    return reduce(operator.add, parts)
