"""The statistics that LeRobot keeps of every feature, of each episode and of a dataset as a whole.

Each is a name -> array: min, max, mean, std and quantiles in the shape of one value, (k,) of a feature's columns and
(3, 1, 1) in [0, 1] of pictures; count, (1,) int64, of rows or of pictures that were looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
# Pictures of an episode and view that are looked at, as many as LeRobot takes of a short one.
PICTURES = 100

Stats = Mapping[str, np.ndarray]


def stats_of(rows: np.ndarray) -> Stats:
    """rows: (N, k)."""
    values = rows.astype(np.float64)
    stats = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
    }
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return stats | dict(zip(QUANTILES, quantiles, strict=True)) | {"count": np.array([len(rows)])}


@dataclass(eq=False)
class PictureStats:
    """Counts how often each value of 8 bits stands in some of a view's pictures, evenly over an episode of `length`."""

    length: int
    _counts: np.ndarray = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    _pictures: int = 0

    def see(self, tick: int, picture: np.ndarray) -> None:
        """picture: (height, width, 3) uint8."""
        if tick % -(-self.length // PICTURES):
            return
        for counts, channel in zip(self._counts, np.moveaxis(picture, 2, 0), strict=True):
            counts += np.bincount(channel.ravel(), minlength=256)
        self._pictures += 1

    def stats(self) -> Stats:
        values = np.arange(256) / 255
        shares = self._counts / self._counts.sum(axis=1, keepdims=True)
        mean = shares @ values
        reached = self._counts.cumsum(axis=1)
        total = reached[0, -1]
        there = self._counts > 0
        stats = {
            "min": values[there.argmax(axis=1)],
            "max": values[255 - there[:, ::-1].argmax(axis=1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(shares @ values**2 - mean**2, 0)),
        }
        stats |= {name: values[(reached >= share * total).argmax(axis=1)] for name, share in QUANTILES.items()}
        return {name: value.reshape(3, 1, 1) for name, value in stats.items()} | {"count": np.array([self._pictures])}


def combined(parts: Sequence[Stats]) -> Stats:
    """Of all episodes together. Quantiles are the mean of the episodes' ones, as LeRobot's are."""
    counts = np.array([part["count"][0] for part in parts])
    weights = counts / counts.sum()

    def mean(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.tensordot(weights, np.stack(values), axes=1)

    total = mean([part["mean"] for part in parts])
    variance = mean([part["std"] ** 2 + (part["mean"] - total) ** 2 for part in parts])
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": total,
        "std": np.sqrt(variance),
        "count": np.array([counts.sum()]),
        **{name: mean([part[name] for part in parts]) for name in QUANTILES},
    }


def as_columns(stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Feature -> its statistics, as columns of meta/episodes."""
    return {f"stats/{feature}/{name}": value.tolist() for feature, of in stats.items() for name, value in of.items()}


def as_json(stats: Mapping[str, Stats]) -> dict[str, Any]:
    """Feature -> its statistics, as meta/stats.json."""
    return {feature: {name: value.tolist() for name, value in of.items()} for feature, of in stats.items()}
