"""What a machine's run found, as sections of its page: latency at a glance, golden cases, tuning, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.machine.plan import SELF_CHECK, Step
from xr0_engine.bench.machine.state import RESULTS, printed
from xr0_engine.bench.results import PERCENTILES, Result, summary
from xr0_engine.bench.step.memory import memory_need
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.tell import report
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.bench.tell.charts import milliseconds
from xr0_engine.bench.tell.page import folded, table
from xr0_engine.fused.tactics import read_tactics

LATENCY_HEAD = ("rounds", "p50", "p90", "p99", "p99.9", "of bound", "")

Named = Sequence[tuple[str, Result]]


def latencies(named: Named) -> str:
    """What a robot waits, at a glance."""
    rows: dict[str, list[list[str]]] = {}
    for each in latency_rows([result for _, result in named]):
        who = each.boundary if each.rival == "engine" else f"{each.boundary}: {each.rival}"
        backend = "" if each.backend == "triton" else f", {each.backend}"
        rows.setdefault(each.case, []).append([f"{who}{backend}", *each.cells])
    if not rows:
        return ""
    lines = [line for case, found in rows.items() for line in ([case], *found)]
    head = ["", *LATENCY_HEAD]
    return f'<section><h2>Latency</h2>{table(head, lines)}<p class="note">{escape(report.TOO_FEW)}</p></section>'


@dataclass(frozen=True)
class LatencyRow:
    """One rival of one result. cells: as LATENCY_HEAD has them."""

    case: str
    boundary: str
    backend: str
    rival: str
    cells: tuple[str, ...]


def latency_rows(results: Sequence[Result]) -> list[LatencyRow]:
    """Of the results that are latencies, in their order."""
    rows = []
    for result in results:
        if result.kind != "latency":
            continue
        case, bounds = result.case, bounds_of(result, results)
        name = ", ".join(str(case[key]) for key in ("name", "size", "dtype")) + f", batch {case['batch']}"
        for rival, stages in result.series.items():
            if not stages.get(report.TOTAL):
                continue
            times = summary(stages[report.TOTAL])
            reached = bounds.reached(report.TOTAL, times["p50"]) if rival == report.OURS else None
            told = ["–" if (ms := times[key]) is None else milliseconds(ms) for key in PERCENTILES]
            share = "–" if reached is None else f"{reached:.0%}"
            whole = "" if result.complete else "interrupted"
            cells = (str(len(stages[report.TOTAL])), *told, share, whole)
            rows.append(LatencyRow(name, result.boundary, result.backend, rival, cells))
    return rows


def golden(folder: Path, steps: Sequence[Step]) -> str:
    """The self-check's verdict; and of every step that compared something, how many were within tolerance, and what
    came nearest to it."""
    rows, verdicts = [], []
    for step in (step for step in steps if step.printed):
        told = printed(folder / RESULTS / step.file)
        if step.name == SELF_CHECK and isinstance(told, Mapping):
            verdicts = [f"Self-check on {each['device']}: {each['runs']}" for each in told.get("auto", [])]
        if not isinstance(told, list) or not told:
            continue
        passed = sum(bool(each["passed"]) for each in told)
        # NaN is the worst of all.
        worst = max(told, key=lambda each: (each["error"] != each["error"], _share(each)))
        where = f"{worst['case']}: {worst['quantity']}"
        cells = f"{worst['error']:.1e}", f"{worst['tolerance']:.1e}", worst["measure"]
        rows.append([step.name, f"{passed} of {len(told)}", where, *cells])
    if not rows and not verdicts:
        return ""
    head = ["", "within tolerance", "nearest to its tolerance, or beyond", "error", "tolerance", "measure"]
    compared = table(head, rows) if rows else "<p>No folder of golden cases was given.</p>"
    lines = "".join(f"<p>{escape(verdict)}</p>" for verdict in verdicts)
    return f"<section><h2>Is it right?</h2>{lines}{compared}</section>"


def _share(comparison: Mapping[str, Any]) -> float:
    return comparison["error"] / comparison["tolerance"] if comparison["tolerance"] else comparison["error"]


def tuning(folder: Path, emulated: bool) -> str:
    """emulated: whose times are the emulator's, so that only what was computed counts."""
    path = folder / "tactics.json"
    if not path.is_file():
        return ""
    found = read_tactics(path)
    if emulated:
        tried = [times for key, times in found.measured.items() if not key.startswith("step ")]
        told = (
            f"{sum(map(len, tried))} variants of {len(tried)} ops gave what the default gives, and so did whole steps."
        )
        return f"<section><h2>Tuning</h2><p>{escape(told)} Which is the fastest, only a GPU can tell.</p></section>"
    rows = []
    for key, times in found.measured.items():
        if not key.startswith("step "):
            best = next(iter(times))
            rows.append([key, best, f"{times[best]:.1f}", str(len(times)), "yes" if key in found.tactics else "no"])
    whole = [
        [key.removeprefix("step "), name, f"{us / 1e3:.3f}"]
        for key, times in found.measured.items()
        if key.startswith("step ")
        for name, us in times.items()
    ]
    steps = f"<h3>Whole steps</h3>{table(['case', '', 'ms'], whole)}" if whole else ""
    ops = folded("Every op", table(["op", "fastest", "us", "tried", "in the table"], rows)) if rows else ""
    told = f"{len(found.tactics)} of {len(rows)} ops that were measured have a variant that beats the default."
    way = f"The flow is {found.flow}{', its first step beside the VLM' if found.overlap else ''}."
    return f"<section><h2>Tuning</h2><p>{escape(told)} {escape(way)}</p>{steps}{ops}</section>"


def memory(named: Named) -> str:
    rows = []
    for _, result in named:
        if "peak_memory_bytes" not in result.facts:
            continue
        case = result.case
        who = f"{report.TITLES[result.kind]}: {case['name']}, {result.boundary}, {result.backend}"
        batch = max(result.facts.get("batches", {"": case.get("batch", 1)}).values())
        peak = result.facts["peak_memory_bytes"]
        rows.append([who, str(batch), ", ".join(result.series), gib(peak), _estimate(result)])
    if not rows:
        return ""
    note = (
        "The most that the process has held; rivals share it. Estimate: weights, kept tables, KV block and activations "
        "of the reference engine, what a library takes for itself left out."
    )
    head = ["", "batch", "in the process", "peak", "estimate"]
    return f'<section><h2>Memory</h2>{table(head, rows)}<p class="note">{note}</p></section>'


def _estimate(result: Result) -> str:
    if result.kind != "latency":
        return "–"
    setup = Setup(CASES[result.case["name"]], result.case["size"])
    return gib(memory_need(*Workload.of_case(setup), result.case["dtype"]).peak)


def gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
