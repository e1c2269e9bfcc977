"""Which bound a measurement is held against: its own, or that of a roofline of the same case and machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xr0_engine.bench.results import Result

MACHINE = ("device", "processor", "threads", "emulated")
NEAR = 0.05
"""How far the numbers of tokens may lie apart: a roofline counts Qwen's tokens, a random checkpoint has its own."""


@dataclass(frozen=True)
class Bounds:
    """stage -> milliseconds at least, `total` among them; chip: whose."""

    chip: str = ""
    ms: Mapping[str, float] = field(default_factory=dict)

    def reached(self, stage: str, median_ms: float | None) -> float | None:
        """The share of the bound, 1 if it is met; None if either is unknown."""
        return self.ms[stage] / median_ms if stage in self.ms and median_ms else None


def bounds_of(result: Result, others: Iterable[Result]) -> Bounds:
    """The result's own bound, else that of a roofline among the others: of the same case, but for a few tokens, and of
    ceilings that were measured on the same machine. Without stages if there is none."""
    # An emulator is no machine that could come near one.
    if result.emulated and result.kind != "roofline":
        return Bounds()
    if "bound_ms" in result.facts:
        return Bounds(str(result.facts.get("chip", "")), result.facts["bound_ms"])
    if result.kind not in ("latency", "jitter"):
        return Bounds()
    for other in others:
        if (
            other.kind == "roofline"
            and same_case(result.case, other.case)
            and same_machine(result, other)
            and _on_the_spot(other)
        ):
            bound = other.facts["bound_ms"]
            # The action head alone has one stage.
            ms = {"total": bound["flow"]} if result.boundary == "flow" else bound
            return Bounds(f"{other.facts['chip']}, {other.case['tokens']} tokens", ms)
    return Bounds()


def same_case(measured: Mapping[str, Any], roofline: Mapping[str, Any]) -> bool:
    """But for a few tokens."""
    tokens, counted = measured.get("tokens", 0), roofline["tokens"]
    return {**measured, "tokens": counted} == roofline and abs(tokens - counted) <= NEAR * counted


def same_machine(one: Result, other: Result) -> bool:
    return all(one.environment.get(key) == other.environment.get(key) for key in MACHINE)


def _on_the_spot(roofline: Result) -> bool:
    """A roofline of ceilings measured on the spot (`--chip here`) is named after its device. A chip by name may differ
    from its namesake in clocks, memory or cooling."""
    chip = str(roofline.facts["chip"])
    return chip == roofline.environment.get("device") or chip.startswith("CPU")
