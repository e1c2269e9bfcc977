"""One self-contained HTML page for some results: figures, percentiles, rivals, and what was measured where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from xr0_engine.bench import results
from xr0_engine.bench.results import DEADLINES_HZ, PERCENTILES, Result, Series, summary
from xr0_engine.bench.tell import charts
from xr0_engine.bench.tell.advice import Advice, advise
from xr0_engine.bench.tell.bounds import Bounds, bounds_of
from xr0_engine.bench.tell.charts import Bar, milliseconds
from xr0_engine.bench.tell.fidelity import speed_and_fidelity
from xr0_engine.bench.tell.page import definitions, document, figure, folded, table
from xr0_engine.bench.timing import ratio_with_spread

OURS = "engine"
TOTAL = "total"
TITLES = {
    "latency": "Latency",
    "throughput": "Throughput",
    "coldstart": "Cold start",
    "jitter": "Jitter",
    "kernels": "Kernels",
    "images": "Frames to patches",
    "ablate": "What each optimisation buys",
    "finetune": "Fine-tuning step",
    "roofline": "Bounds",
    "predict": "Predicted step",
}
ON_TIME = ("latency", "jitter")
"""Kinds whose total a deadline is held against."""
LIMITS = {f"{rate} Hz limit": 1000 / rate for rate in DEADLINES_HZ}
EMULATED = "Emulated: these are the emulator's own times. They say nothing about any GPU."
TOO_FEW = "Milliseconds. A dash: too few rounds to tell (p90 needs 10, p99 needs 100, p99.9 needs 1000), or no bound."


def run(files: Sequence[Path], out: Path) -> None:
    """`xr0 bench report`. Raises ValueError for a file that is no result, OSError."""
    if not files:
        raise ValueError("results: expected at least one file, got none")
    out.write_text(page([(file.name, results.read(file)) for file in files]), encoding="utf-8")


def page(named: Sequence[tuple[str, Result]]) -> str:
    """The HTML of (file name, result) pairs, one section each. Numbers of two runs never share a figure, but a roofline
    of the same case and machine gives the others their bound. Raises ValueError as check_unmixed."""
    check_unmixed({name: result.emulated for name, result in named})
    machines = ", ".join(dict.fromkeys(machine(result) for _, result in named))
    nav = links(named) if len(named) > 1 else ""
    header = f"<h1>xr0-engine benchmarks</h1><p>{escape(machines)}</p>{nav}"
    return document(f"xr0-engine benchmarks: {machines}", header, sections(named))


def links(named: Sequence[tuple[str, Result]]) -> str:
    """To the sections."""
    labels = [_heading(result) + (f", {result.boundary}" if result.kind == "latency" else "") for _, result in named]
    found = (f'<a href="#r{number}">{escape(label)}</a>' for number, label in enumerate(labels))
    return f"<nav>{''.join(found)}</nav>"


def sections(named: Sequence[tuple[str, Result]]) -> str:
    others = [result for _, result in named]
    return "\n".join(
        _section(number, name, result, bounds_of(result, others), others) for number, (name, result) in enumerate(named)
    )


def check_unmixed(emulated: Mapping[str, str | None]) -> None:
    """emulated: name -> Result.emulated. Raises ValueError if some are and others are not."""
    if len({chip is None for chip in emulated.values()}) > 1:
        names = ", ".join(name for name, chip in emulated.items() if chip is not None)
        raise ValueError(f"results: the times of an emulator stand beside no measured ones, and {names} is emulated")


def machine(result: Result) -> str:
    """The GPU, or the processor and how many threads of it."""
    known = result.environment
    device = str(known.get("device", "unknown device"))
    threads = "1 thread" if known.get("threads") == 1 else f"{known.get('threads')} threads"
    place = f"{known.get('processor', 'unknown CPU')}, {threads}" if device == "cpu" else device
    return place if result.emulated is None else f"{result.emulated}, emulated on {place}"


def _section(number: int, name: str, result: Result, bounds: Bounds, others: Sequence[Result]) -> str:
    series = _ordered(result.series)
    warning = "" if result.complete else '<p class="warning">Interrupted: this holds the rounds that were finished.</p>'
    warning += f'<p class="warning">{escape(EMULATED)}</p>' if result.emulated else ""
    parts = [
        f'<section id="r{number}"><h2>{escape(_heading(result))}</h2>',
        f'<p class="where">{escape(_measured(result))}</p><p class="command">{escape(result.command)}</p>{warning}',
        _tiles(result, series, bounds),
        speed_and_fidelity(result, series),
        *_figures(result, series, bounds),
        _percentiles(result, series, bounds),
        _advice(advise(result, bounds, others)),
        _operators(result.facts.get("operators", [])),
        _details(name, result),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _ordered(series: Series) -> Series:
    """The engine first, then the others as they came; nothing empty."""
    kept = {rival: {stage: v for stage, v in stages.items() if len(v)} for rival, stages in series.items()}
    return {rival: kept[rival] for rival in sorted(kept, key=lambda rival: rival != OURS) if kept[rival]}


def _figures(result: Result, series: Series, bounds: Bounds) -> list[str]:
    if not series:
        return []
    if result.kind == "throughput":
        return _throughput(series, result.facts.get("batches", {}))
    if result.kind == "ablate":
        return _ablation(series, result.facts)
    if result.kind == "jitter":
        return _jitter(series)
    drawn = []
    if max(map(len, series.values())) > 1:
        in_turn = result.kind not in ("kernels", "images")
        medians = {rival: {s: float(np.median(v)) for s, v in stages.items()} for rival, stages in series.items()}
        caption = "Stages one after the other, medians" if in_turn else f"{TITLES[result.kind]}, medians"
        caption += ", and the bound inside each bar" if bounds.ms else ""
        label = f"bound ({bounds.chip})" if bounds.chip else "bound"
        chart = charts.timeline(medians, bounds.ms, caption, in_turn)
        drawn.append(figure(caption, chart, series, label if bounds.ms else None))
    totals = {rival: stages[TOTAL] for rival, stages in series.items() if TOTAL in stages}
    if totals and result.kind == "latency":
        drawn += _spread(totals, "whole call")
    return drawn + (_rivals(series) if OURS in series else [])


def _spread(samples: charts.Samples, what: str) -> list[str]:
    """Histogram, distribution, and the rounds in order."""
    # Others on the same axis would squeeze the first one's shape into a few bins.
    first, values = next(iter(samples.items()))
    shape = figure(f"How long the {what} took: {first}", charts.histogram({first: values}, LIMITS, "Histogram"))
    done = figure("Share done by a time", charts.distribution(samples, LIMITS, "Cumulative distribution"), samples)
    order = figure("Every round, in order", charts.rounds(samples, LIMITS, "Rounds in order"), samples)
    return [f'<div class="pair">{shape}{done}</div>', order]


def _jitter(series: Series) -> list[str]:
    """The call, and how late it began; both in milliseconds."""
    names = {TOTAL: "inference", "lateness": "start after its tick was due"}
    stages = next(iter(series.values()))
    return _spread({names.get(stage, stage): values for stage, values in stages.items()}, "calls of the loop")


def _tiles(result: Result, series: Series, bounds: Bounds) -> str:
    """The figures to read first: of the engine, or of the first series."""
    name, stages = next(iter(series.items()), ("", {}))
    tiles: list[tuple[str, str]] = []
    if TOTAL in stages and result.kind != "throughput":
        found = summary(stages[TOTAL])
        labels = {"p50": "p50", "p99": "p99", "max": "slowest"}
        tiles = [(f"{name} {label}", f"{_cell(found[key])} ms") for key, label in labels.items() if found[key]]
        if result.kind in ON_TIME:
            tiles += [(f"missed at {rate} Hz", _share(found[f"missed_{rate}hz"])) for rate in DEADLINES_HZ]
        reached = bounds.reached(TOTAL, found["p50"])
        tiles += [("of the bound", f"{reached:.0%}")] if reached else []
    if TOTAL in bounds.ms:
        tiles.append(("bound", f"{milliseconds(bounds.ms[TOTAL])} ms"))
    if "missed_deadlines" in result.facts:
        tiles.append(("ticks missed", f"{result.facts['missed_deadlines']} of {result.facts['ticks']}"))
    if "peak_memory_bytes" in result.facts:
        # Of the process: rivals share it.
        tiles.append(("peak memory", _gibibytes(result.facts["peak_memory_bytes"])))
    shown = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    return f'<dl class="tiles">{shown}</dl>' if tiles else ""


def _percentiles(result: Result, series: Series, bounds: Bounds) -> str:
    on_time = result.kind in ON_TIME
    head = ["", "rounds", "p50", "p90", "p99", "p99.9", "max"]
    head += [f"missed {rate} Hz" for rate in DEADLINES_HZ] if on_time else []
    head += ["bound", "of bound"] if bounds.ms else []
    rows: list[list[str]] = []
    flat = all(len(stages) == 1 for stages in series.values())
    for rival, stages in series.items():
        rows += [] if flat else [[rival]]
        for stage, samples in stages.items():
            found = summary(samples)
            row = [rival if flat else stage, str(len(samples))]
            row += [_cell(found[key]) for key in (*PERCENTILES, "max")]
            if on_time:
                row += [_share(found[f"missed_{rate}hz"]) if stage == TOTAL else "" for rate in DEADLINES_HZ]
            if bounds.ms:
                reached = bounds.reached(stage, found["p50"])
                row += [_cell(bounds.ms.get(stage)), "–" if reached is None else f"{reached:.0%}"]
            rows.append(row)
    if not rows:
        return ""
    whole = f'{table(head, rows)}<p class="note">{escape(TOO_FEW)}</p>'
    # Many variants, of which the figure above tells what matters.
    return folded("Percentiles", whole) if result.kind == "ablate" else f"<h3>Percentiles</h3>{whole}"


def _advice(found: Sequence[Advice]) -> str:
    if not found:
        return ""
    rows = [[each.stage, _cell(each.bound_ms), _cell(each.time_ms), f"{each.reached:.0%}", each.next] for each in found]
    return f"<h3>What to try next</h3>{table(['', 'bound', 'p50', 'of bound', 'next'], rows)}"


def _rivals(series: Series) -> list[str]:
    drawn, rows = [], []
    for number, (rival, stages) in enumerate(series.items()):
        # A stage too short for the clock has no ratio.
        for stage in (s for s in stages if rival != OURS and min(series[OURS].get(s, [0.0])) > 0):
            middle, low, high = ratio_with_spread(np.asarray(stages[stage]), np.asarray(series[OURS][stage]))
            told = f"{middle:.2f} (quartiles {low:.2f} to {high:.2f})"
            drawn.append(Bar(f"{rival}: {stage}", middle, low, high, number, f"{rival} / {OURS}, {stage}: {told}"))
            rows.append([f"{rival} / {OURS}", stage, f"{middle:.2f}", f"{low:.2f} to {high:.2f}"])
    if not drawn:
        return []
    caption = "Rivals: their time over the engine's, round by round; above 1 the engine is faster"
    chart = charts.bars(drawn, "rival / engine, with quartiles", caption)
    return [figure(caption, chart), folded("The same as a table", table(["", "stage", "median", "quartiles"], rows))]


def _ablation(series: Series, facts: Mapping[str, Any]) -> list[str]:
    """Each variant at the stage where it should tell."""
    whole, drawn, rows = series[OURS], [], []
    for name in (name for name in series if name != OURS):
        stage = facts["stages"][name]
        for place in dict.fromkeys((stage, TOTAL)):
            without, engine = np.asarray(series[name][place]), np.asarray(whole[place])
            middle, low, high = ratio_with_spread(without, engine)
            bought = f"{float(np.median(without - engine)):+.3g} ms"
            rows.append([name, place, f"{middle:.2f}", f"{low:.2f} to {high:.2f}", bought])
            if place == stage:
                told = f"{name}: {bought}, {middle:.2f} times (quartiles {low:.2f} to {high:.2f}) of the {stage}"
                tip = f"{told}; without it, {facts['instead'][name]}"
                drawn.append(Bar(f"{name} ({stage})", middle, low, high, 0, tip))
    if not drawn:
        return []
    drawn.sort(key=lambda bar: -bar.middle)
    caption = "Time of the stage without an optimisation over the time with it; 1: it buys nothing here"
    chart = charts.bars(drawn, "without / with, with quartiles", caption)
    head = ["without", "stage", "median", "quartiles", "bought"]
    return [figure(caption, chart), folded("The same as a table", table(head, rows))]


def _throughput(series: Series, batches: Mapping[str, int]) -> list[str]:
    times = [(float(batch), float(np.median(series[name][TOTAL]))) for name, batch in batches.items() if name in series]
    times = sorted(point for point in times if point[1] > 0)
    if not times:
        return []
    chunks = {OURS: [(batch, 1000 * batch / median_ms) for batch, median_ms in times]}
    left = figure("Chunks per second", charts.curve(chunks, "batch", "chunks / s", "Chunks per second by batch"))
    right = figure("Median time of a call", charts.curve({OURS: times}, "batch", "ms", "Time of a call by batch"))
    return [f'<div class="pair">{left}{right}</div>']


def _operators(operators: Sequence[Mapping[str, Any]]) -> str:
    if not operators:
        return ""
    rows = [
        [f"{op['stage']}: {op['name']}", str(op["count"]), _cell(op["bound_ms"]), str(op["limit"])] for op in operators
    ]
    return f"<h3>Operators</h3>{table(['', 'runs', 'bound, ms', 'limited by'], rows)}"


def _details(name: str, result: Result) -> str:
    facts = {k: v for k, v in result.facts.items() if k not in ("bound_ms", "operators")}
    run_facts = {
        "created": result.created,
        "commit": result.commit,
        "file": name,
        "boundary": result.boundary,
        "backend": result.backend,
    }
    groups = {"run": run_facts, "case": result.case, "machine": result.environment, "facts": facts}
    blocks = [
        definitions(title, [(str(key), _told(str(key), value)) for key, value in group.items()])
        for title, group in groups.items()
        if group
    ]
    return folded("How it was measured", f'<div class="details">{"".join(blocks)}</div>')


def _heading(result: Result) -> str:
    case = [result.case.get(key) for key in ("name", "size", "dtype", "recipe")]
    return f"{TITLES[result.kind]}: {', '.join(str(part) for part in case if part)}"


def _measured(result: Result) -> str:
    commit = result.commit or "unknown"
    short = commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
    parts = [machine(result), f"torch {result.environment.get('torch')}", f"backend {result.backend}"]
    return " · ".join([*parts, f"boundary {result.boundary}", f"commit {short}", result.created[:10]])


def _told(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int | float):
        return _gibibytes(value)
    if isinstance(value, Mapping):
        unit = {inner: key if key.endswith("_bytes") else str(inner) for inner in value}
        return ", ".join(f"{inner}: {_told(unit[inner], item)}" for inner, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_told("", item) for item in value) + "]"
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _gibibytes(value: float) -> str:
    return f"{value / 2**30:.3g} GiB"


def _cell(value: float | None) -> str:
    return "–" if value is None else milliseconds(value)


def _share(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.1%" if 0 < value < 0.001 else f"{value:.1%}"
