"""What every benchmark prints: 80 columns, and beside the numbers what they depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from xr0_engine.bench.results import DEADLINES_HZ, PERCENTILES, Result, summary


def latency_table(result: Result) -> Table:
    case = result.case
    table = Table(title=f"{case['name']}, {case['size']}, batch {case['batch']}, {precision(case)}, ms", box=None)
    table.add_column("stage")
    for name in (*PERCENTILES, "max"):
        table.add_column(name.replace("_", "."), justify="right")
    for rate in DEADLINES_HZ:
        table.add_column(f"> {1000 / rate:.3g} ms", justify="right")
    for rival, stages in result.series.items():
        table.add_row(f"[bold]{rival}")
        for stage, samples in stages.items():
            found = summary(samples)
            times = [number(found[name]) for name in (*PERCENTILES, "max")]
            # Deadlines are the whole call's.
            missed = [f"{found[f'missed_{rate}hz']:.1%}" if stage == "total" else "" for rate in DEADLINES_HZ]
            table.add_row(f"  {stage}", *times, *missed)
    return table


def footer(result: Result) -> str:
    """Where, with what, how often: beside every table."""
    known: dict[str, Any] = dict(result.environment)
    where = known["processor"] if known["device"] == "cpu" else known["device"]
    rounds = min(len(samples) for stages in result.series.values() for samples in stages.values())
    lines = [
        f"boundary {result.boundary}, backend {result.backend}, {rounds} rounds",
        f"{where}, {known['threads']} of {known['cores']} cores, torch {known['torch']}",
    ]
    if "peak_memory_bytes" in result.facts:
        lines.append(f"peak memory {result.facts['peak_memory_bytes'] / 2**30:.2f} GiB, the whole process")
    if result.emulated:
        lines.append(f"EMULATED {result.emulated}: the times are the emulator's, and say nothing about any GPU")
    if not result.complete:
        lines.append("INTERRUPTED: only the rounds that were finished")
    return "\n".join(lines)


def precision(case: Mapping[str, Any]) -> str:
    """Of a result's case: its dtype, and the recipe of what has 8 bits."""
    return f"{case['dtype']}, recipe {case['recipe']}" if "recipe" in case else str(case["dtype"])


def size(count: float) -> str:
    """Of bytes, in the units that memory is sold in."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def number(value: float | None) -> str:
    """Milliseconds; a dash for what so few samples cannot tell."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
