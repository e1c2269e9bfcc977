"""What a predicted step tells of its stages: for `xr0 bench predict`, and for the table of a folder of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TOTAL = "total"


@dataclass(frozen=True)
class Row:
    """Of some kinds of launches together.

    launches; splits: of these, that combine parts through memory. wasted: share of rows that are padding; processors:
    that have work; both on average over the time. l2_bytes, memory_bytes: that are moved. ms: low, central, high.
    limit: what takes most of it.
    """

    launches: int
    splits: int
    wasted: float
    l2_bytes: float
    memory_bytes: float
    processors: float
    ms: tuple[float, float, float]
    bound_ms: float
    limit: str

    def cells(self) -> tuple[str, ...]:
        """As CELLS names them."""
        low, central, high = self.ms
        return (
            str(self.launches), str(self.splits), f"{self.wasted:.0%}", f"{self.l2_bytes / 1e9:.2f}",
            f"{self.memory_bytes / 1e9:.2f}", f"{self.processors:.0f}", f"{central:.2f}", f"{low:.2f}", f"{high:.2f}",
            f"{self.bound_ms:.2f}", self.limit,
        )  # fmt: skip


CELLS = ("launches", "splits", "waste", "L2 GB", "mem GB", "SMs", "ms", "from", "to", "bound", "limit")


def row(launches: Sequence[Mapping[str, Any]], ms: Sequence[float], bound_ms: float) -> Row:
    """launches: entries of facts["launches"], at least one (predict/run.py)."""

    def summed(key: str) -> float:
        return sum(each[key] for each in launches)

    def averaged(key: str) -> float:
        return sum(each["ms"][1] * each[key] for each in launches) / sum(each["ms"][1] for each in launches)

    limits: dict[str, float] = {}
    for each in launches:
        limits[each["limit"]] = limits.get(each["limit"], 0.0) + each["ms"][1]
    low, central, high = ms
    return Row(
        round(summed("launches")), round(summed("split_launches")), averaged("wasted_rows"), summed("l2_bytes"),
        summed("memory_bytes"), averaged("processors"), (low, central, high), bound_ms,
        max(limits, key=lambda limit: limits[limit]),
    )  # fmt: skip


def stages(facts: Mapping[str, Any]) -> dict[str, Row]:
    """Of a predicted step: its stages, and the whole behind them."""
    found = {}
    for stage, ms in facts["ms"].items():
        part = [each for each in facts["launches"] if stage in (each["stage"], TOTAL)]
        found[stage] = row(part, ms, facts["bound_ms"][stage])
    return found
