"""bench/results/README.md, rendered from the results beside it: the latest of each machine, case and boundary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from xr0_engine.bench import results
from xr0_engine.bench.results import DEADLINES_HZ, PERCENTILES, Result, summary
from xr0_engine.bench.tell import predicted
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.bench.tell.charts import milliseconds
from xr0_engine.bench.tell.report import TITLES, TOTAL, machine

Named = tuple[str, Result]

IN_TABLE = ("latency", "throughput", "coldstart", "jitter")
"""Kinds whose whole calls are a row each. Predicted steps have a table of their own, with a row a stage. The others are
listed: `xr0 bench report` draws them."""

INTRODUCTION = """# Measured

Rendered from the JSON files in this folder by `xr0 bench report --table bench/results`; edit nothing here. How to
measure, and how to read the numbers: [docs/benchmarks.md](../../../docs/benchmarks.md).
"""
EMPTY = """
No result has been committed yet. Nothing was measured on a GPU so far.
"""
LEGEND = """
Milliseconds. A dash: too few rounds to tell, or no bound known. Missed: rounds longer than 33.3 ms (30 Hz) and 10 ms
(100 Hz). Of bound: the bound of the same case with this machine's measured ceilings, over p50. A random checkpoint's
tokenizer makes prompts a few tokens shorter than the bound counts.

Predicted: a model's times, nothing measured, from and to ([how far to trust it](../../../docs/benchmarks.md)); columns
as `xr0 bench predict` has them.
"""


def run(folder: Path) -> Path:
    """`xr0 bench report --table FOLDER`: writes and returns its README.md. Raises ValueError as `render`, OSError."""
    text = render(folder)
    readme = folder / "README.md"
    readme.write_text(text, encoding="utf-8")
    return readme


def render(folder: Path) -> str:
    """Markdown. Raises ValueError for a JSON file in the folder that is no result or an emulated one, or if there is no
    such folder."""
    if not folder.is_dir():
        raise ValueError(f"--table: expected a folder with results, got {folder}")
    named = [(file.name, results.read(file)) for file in sorted(folder.glob("*.json"))]
    if emulated := [name for name, result in named if result.emulated]:
        raise ValueError(f"--table: an emulator's times are no measurements, and {', '.join(emulated)} is emulated")
    complete = [pair for pair in named if pair[1].complete]
    cut_short = [name for name, result in named if not result.complete]
    machines: dict[str, list[Named]] = {}
    for pair in _latest(complete):
        machines.setdefault(machine(pair[1]), []).append(pair)
    parts = [INTRODUCTION]
    for name in sorted(machines):
        parts.append(f"\n## {_cell(name)}\n{_tables(machines[name])}")
    parts.append(LEGEND if machines else EMPTY)
    if cut_short:
        parts.append(f"\nLeft out, because the run was interrupted: {', '.join(map(_link, cut_short))}.\n")
    return "".join(parts)


def _latest(named: Sequence[Named]) -> list[Named]:
    """Of results that measure the same thing the youngest; in the order of kind, case and boundary."""
    found: dict[str, Named] = {}
    # All are in UTC and written alike.
    for pair in sorted(named, key=lambda pair: pair[1].created):
        result = pair[1]
        same = [result.kind, machine(result), result.boundary, result.backend, result.facts.get("part"), result.case]
        if result.kind == "predict":
            # What a change is predicted to buy is told by both.
            same += [result.commit, result.facts.get("table")]
        found[json.dumps(same, sort_keys=True)] = pair
    kinds = list(TITLES)
    return sorted(
        found.values(), key=lambda pair: (kinds.index(pair[1].kind), _case(pair[1]), pair[1].boundary, pair[0])
    )


def _tables(named: Sequence[Named]) -> str:
    head = ["measured", "case", "boundary", "", "rounds", "p50", "p90", "p99", "p99.9", "max"]
    head += [f"missed {rate} Hz" for rate in DEADLINES_HZ] + ["of bound", "when, commit"]
    lines = [head, ["---"] * 4 + ["---:"] * (len(head) - 5) + ["---"]]
    others = [result for _, result in named]
    for name, result in named:
        bounds = bounds_of(result, others)
        for rival, stages in result.series.items() if result.kind in IN_TABLE else ():
            found = summary(stages[TOTAL])
            row = [f"[{TITLES[result.kind]}]({name})", _case(result), result.boundary, rival, str(len(stages[TOTAL]))]
            row += [_number(found[key]) for key in (*PERCENTILES, "max")]
            on_time = result.kind in ("latency", "jitter")
            row += [f"{found[f'missed_{rate}hz']:.1%}" if on_time else "" for rate in DEADLINES_HZ]
            reached = bounds.reached(TOTAL, found["p50"])
            lines.append([*row, "–" if reached is None else f"{reached:.0%}", _when(result)])
    further = [
        f"- [{TITLES[result.kind]}]({name}): {_cell(_case(result))} ({_when(result)})\n"
        for name, result in named
        if result.kind not in IN_TABLE and not _is_step(result)
    ]
    tables = [_markdown(table) for table in (lines, _steps(named)) if len(table) > 2]
    return "".join(f"\n{part}" for part in (*tables, "".join(further)) if part)


def _is_step(result: Result) -> bool:
    return result.kind == "predict" and "launches" in result.facts


def _steps(named: Sequence[Named]) -> list[list[str]]:
    """Predicted steps, the older one of a case first."""
    head = ["predicted", "case", "flow", "stage", *predicted.CELLS, "when, commit"]
    lines = [head, ["---"] * 4 + ["---:"] * (len(predicted.CELLS) - 1) + ["---"] * 2]
    steps = [pair for pair in named if _is_step(pair[1])]
    for name, result in sorted(steps, key=lambda pair: (_case(pair[1]), pair[1].created)):
        for stage, row in predicted.stages(result.facts).items():
            link = f"[{TITLES[result.kind]}]({name})"
            lines.append([link, _case(result), str(result.facts["part"]), stage, *row.cells(), _when(result)])
    return lines


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _case(result: Result) -> str:
    case = result.case
    batch = f"batch {case['batch']}" if case.get("batch", 1) != 1 else None
    part = "action head" if result.facts.get("part") == "dit" else None
    return ", ".join(
        str(word)
        for word in (case.get("name"), case.get("size"), part, batch, case.get("dtype"), case.get("recipe"))
        if word
    )


def _when(result: Result) -> str:
    commit = result.commit or "unknown"
    return f"{result.created[:10]}, {commit[:7]}{'-dirty' if commit.endswith('-dirty') else ''}"


def _number(value: float | None) -> str:
    return "–" if value is None else milliseconds(value)


def _link(name: str) -> str:
    return f"[{name}]({name})"


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its line, and holds no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
