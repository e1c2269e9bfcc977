"""The page of a machine's run: what passed, what failed and how, the figures, what to try next, how to send it in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from xr0_engine.bench.machine import findings
from xr0_engine.bench.machine.facts import OPTIONAL
from xr0_engine.bench.machine.findings import Named, gib
from xr0_engine.bench.machine.plan import PARTS, Step, parts_of
from xr0_engine.bench.machine.state import (
    CUT_SHORT,
    FAULTS,
    LEFT_OUT,
    LOGS,
    PAGE,
    PASSED,
    RESULTS,
    Ended,
    State,
    results_of,
)
from xr0_engine.bench.results import Result, summary
from xr0_engine.bench.tell import report
from xr0_engine.bench.tell.advice import GOOD, advise
from xr0_engine.bench.tell.bounds import bounds_of
from xr0_engine.bench.tell.charts import milliseconds
from xr0_engine.bench.tell.page import definitions, document, folded
from xr0_engine.whole import write_whole

TAIL_LINES = 40
"""Of a log, on the page; the folder holds all of it."""
KINDS = {PASSED: "good", CUT_SHORT: "open", LEFT_OUT: "none", **dict.fromkeys(FAULTS, "bad")}
"""Verdict -> how its badge looks; what is not named here is still to be done."""

DOUBTS = ("correct", "sanitizer")
"""Parts whose faults make every result doubtful."""


def write_page(folder: Path, facts: Mapping[str, Any], steps: Sequence[Step], state: State) -> None:
    """Raises OSError if it cannot be written, ValueError for a result that is broken."""
    write_whole(folder / PAGE, page(folder, facts, steps, state))


def page(folder: Path, facts: Mapping[str, Any], steps: Sequence[Step], state: State) -> str:
    named = _in_order(results_of(folder), steps)
    name = machine_name(facts)
    chip = facts["emulated"]
    banner = "" if chip is None else _banner(chip, facts["environment"]["processor"])
    known = facts["environment"]
    versions = [f"{word} {known[word]}" for word in ("driver", "torch", "triton") if known.get(word)]
    told = [f"xr0-engine {facts['version']}", f"commit {short_commit(facts)}", *versions]
    header = f"<h1>xr0-engine on {escape(name)}</h1><p>{escape(' · '.join([*told, state.created[:10]]))}</p>{banner}"
    blocks = [
        _summary(state, steps, named),
        "" if chip is not None else findings.latencies(named),
        _steps(folder, state, steps),
        _next(facts, state, steps, named),
        findings.golden(folder, steps),
        findings.tuning(folder, chip is not None),
        findings.memory(named),
        _machine(facts),
        _sending(facts, state),
    ]
    figures = f"<h2>Figures</h2>{report.links(named)}" if named else ""
    main = "\n".join([*(block for block in blocks if block), figures, report.sections(named)])
    return document(f"xr0-engine on {name}", header, main)


def machine_name(facts: Mapping[str, Any]) -> str:
    """The GPU, or what is emulated where."""
    if facts["emulated"] is not None:
        return f"sm_{facts['emulated']}, emulated"
    return facts["gpu"]["name"]


def short_commit(facts: Mapping[str, Any]) -> str:
    """`none` for an installed package, of which the version tells."""
    commit = facts["commit"]
    return "none" if commit is None else commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")


def _banner(chip: int, processor: str) -> str:
    return (
        f'<div class="banner"><strong>EMULATED</strong>A CPU ({escape(processor)}) executed the code that was compiled '
        f"for sm_{chip}. What was computed counts; no time on this page is a measurement of a GPU.</div>"
    )


def _in_order(named: Named, steps: Sequence[Step]) -> list[tuple[str, Result]]:
    places = {step.file: place for place, step in enumerate(steps)}
    return sorted(named, key=lambda pair: places.get(pair[0], len(places)))


def _summary(state: State, steps: Sequence[Step], named: Named) -> str:
    verdicts = [state.verdict(step.name) or LEFT_OUT for step in steps]
    counts = Counter("failed" if verdict in FAULTS else verdict for verdict in verdicts)
    seconds = sum(each.seconds for each in state.ended.values())
    words = dict.fromkeys((PASSED, "failed", *counts))
    tiles = [(f"steps {word}", str(counts[word])) for word in words]
    tiles.append(("minutes", f"{seconds / 60:.1f}"))
    others = [result for _, result in named]
    for result in (result for result in others if result.kind == "latency" and result.boundary == "replay"):
        found, bounds = summary(result.series["engine"]["total"]), bounds_of(result, others)
        where = str(result.case["name"])
        tiles.append((f"{where}, replay p50", f"{milliseconds(found['p50'] or 0)} ms"))
        if reached := bounds.reached("total", found["p50"]):
            tiles.append((f"{where}, of the bound", f"{reached:.0%}"))
    shown = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    pairs = zip(steps, verdicts, strict=True)
    faults = [f"{step.name} ({verdict})" for step, verdict in pairs if verdict in FAULTS]
    if faults:
        sentence = f'<p class="warning">Not as it should be: {escape(", ".join(faults))}.</p>'
    elif counts[PASSED]:
        sentence = "<p>All that was run has passed.</p>"
    else:
        sentence = "<p>Nothing was run yet.</p>"
    reason = state.told.get("size_reason")
    size = f"Sizes: {state.told.get('size')}{f', since {reason}' if reason else ''}. Weights are random."
    note = f'<p class="note">{escape(size)}</p>'
    return f'<section><h2>In short</h2>{sentence}<dl class="tiles">{shown}</dl>{note}</section>'


def _steps(folder: Path, state: State, steps: Sequence[Step]) -> str:
    rows = []
    for part, found in parts_of(steps).items():
        rows.append(f'<tr><th scope="rowgroup" colspan="4">{escape(PARTS[part])}</th></tr>')
        without: dict[str, list[str]] = {}
        for step in found:
            ended = state.ended.get(step.name, Ended("not begun"))
            if ended.verdict == LEFT_OUT:
                without.setdefault(ended.reason, []).append(step.name)
            else:
                rows.append(_row(folder, step, ended))
        for reason, names in without.items():
            told = f'{escape(reason)}<div class="note">{escape(", ".join(names))}</div>'
            rows.append(f'<tr><th scope="row">{_badge(LEFT_OUT)}</th><td colspan="3">{told}</td></tr>')
    body = f"<tbody>{''.join(rows)}</tbody>"
    return f'<section><h2>What was run</h2><div class="table"><table class="steps">{body}</table></div></section>'


def _row(folder: Path, step: Step, ended: Ended) -> str:
    taken = f"{ended.seconds:.0f} s" if ended.seconds else ""
    told = escape(step.what) + (f'<div class="note">{escape(ended.reason)}</div>' if ended.reason else "")
    if ended.verdict in (*FAULTS, CUT_SHORT):
        told += _tail(folder / LOGS / f"{step.name}.log")
    cells = f'<td class="time">{taken}</td><td>{escape(step.name)}</td><td>{told}</td>'
    return f'<tr><th scope="row">{_badge(ended.verdict)}</th>{cells}</tr>'


def _badge(verdict: str) -> str:
    return f'<span class="badge {KINDS.get(verdict, "open")}">{escape(verdict)}</span>'


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-TAIL_LINES:]
    return folded(f"The end of {LOGS}/{log.name}", f"<pre>{escape(chr(10).join(lines) or 'nothing was printed')}</pre>")


def _next(facts: Mapping[str, Any], state: State, steps: Sequence[Step], named: Named) -> str:
    """Faults first, then what is slowest above its bound, then what was left out."""
    found = []
    for step in steps:
        verdict = state.verdict(step.name)
        if verdict in FAULTS:
            safe = " Until it is understood, run the engine with --backend reference." if step.part in DOUBTS else ""
            found.append(f"{step.name} {verdict}: send the folder in; the same command tries it once more.{safe}")
    others = [result for _, result in named]
    for result in others:
        if not result.emulated:
            slow = [each for each in advise(result, bounds_of(result, others), others) if each.reached < GOOD]
            for each in slow:
                where = f"{result.case['name']}, {each.stage} ({result.boundary})"
                found.append(f"{where}, at {each.reached:.0%} of its bound: {each.next}")
    open_s = [
        step.least_s for step in steps if step.left_out is None and state.verdict(step.name) not in (PASSED, *FAULTS)
    ]
    if open_s:
        found.append(
            f"Still open: {len(open_s)} steps. The same command goes on with them; it needs {sum(open_s) / 60:.1f} "
            "minutes or more."
        )
    missing = [f"{name} ({what})" for name, what in OPTIONAL.items() if not facts["optional"][name]]
    if missing:
        found.append(f"Not installed: {', '.join(missing)}.")
    if (facts["gpu"] or {}).get("others"):
        found.append("Other processes computed on this GPU: end them and measure again.")
    if not found:
        return ""
    items = "".join(f"<li>{escape(each)}</li>" for each in found)
    return f'<section><h2>What to try next</h2><ol class="next">{items}</ol></section>'


def _machine(facts: Mapping[str, Any]) -> str:
    environment = {key: value for key, value in facts["environment"].items() if key != "clocks_mhz"}
    gpu = facts["gpu"]
    known = (
        {}
        if gpu is None
        else {
            "name": gpu["name"],
            "compute capability": f"{gpu['capability'] / 10:.1f}",
            "memory": gib(gpu["memory_bytes"]),
            "processes that compute on it": gpu["others"],
        }
    )
    rest = {
        "CUDA that torch was built with": facts["cuda"],
        "native CUDA operator": facts["native_cuda_fault"] or "ready",
        "compute-sanitizer": "installed" if facts["sanitizer"] else "not installed",
        "memory available": gib(facts["memory_available_bytes"]),
        "disk free": gib(facts["disk_free_bytes"]),
        **{name: "installed" if there else "not installed" for name, there in facts["optional"].items()},
    }
    groups = {"software": environment, "GPU": known | facts["smi"], "more": rest}
    blocks = [
        definitions(title, [(str(key), str(value)) for key, value in group.items() if value is not None])
        for title, group in groups.items()
        if group
    ]
    return f'<section><h2>The machine</h2><div class="details">{"".join(blocks)}</div></section>'


def _sending(facts: Mapping[str, Any], state: State) -> str:
    archive, command = tar_command(facts, state)
    contents = (
        f"The folder holds this page, state.json and machine.json, {RESULTS}/ with every sample, {LOGS}/ with what "
        "each step printed, and the table that tuning made. Paths of this machine, the user and its name were taken "
        "out; no weights, images or keys are in it. Look through it before you send it."
    )
    return (
        f"<section><h2>Sending it in</h2><p>{escape(contents)}</p>"
        f'<p>In the folder above it:</p><p class="command">{escape(command)}</p>'
        f"<p>Then attach {escape(archive)} to an issue of the project. Two such folders stand side by side with "
        f"<code>xr0 bench report FOLDER FOLDER --out machines.html</code>.</p></section>"
    )


def tar_command(facts: Mapping[str, Any], state: State) -> tuple[str, str]:
    """The archive's name, and what makes it in the folder above."""
    slug = f"emulated-sm-{facts['emulated']}" if facts["emulated"] is not None else facts["gpu"]["slug"]
    archive = f"xr0-machine-{slug}-{state.created[:10]}.tar.gz"
    return archive, f"tar --exclude='.*' -czf {archive} {state.folder.name}"
