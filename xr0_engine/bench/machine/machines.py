"""Several machines side by side: the folders that `xr0 bench machine` left, as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from xr0_engine.bench.machine.findings import LATENCY_HEAD, latency_rows
from xr0_engine.bench.machine.page import machine_name, short_commit
from xr0_engine.bench.machine.plan import PARTS
from xr0_engine.bench.machine.state import FACTS, FAULTS, PASSED, State, printed, read, results_of
from xr0_engine.bench.results import Result
from xr0_engine.bench.tell.page import document, table
from xr0_engine.bench.tell.report import EMULATED, OURS, TOO_FEW, check_unmixed
from xr0_engine.whole import write_whole


@dataclass(frozen=True)
class Machine:
    """One folder."""

    name: str
    facts: Mapping[str, Any]
    state: State
    results: Sequence[Result]

    @property
    def commit(self) -> str:
        """Or the version of what was installed."""
        return f"version {self.facts['version']}" if self.facts["commit"] is None else short_commit(self.facts)

    def parts(self) -> tuple[str, str]:
        """How many parts passed, of those that ran; which failed."""
        ran = {part: set(verdicts) for part in PARTS if (verdicts := self.state.ran(part))}
        passed = [part for part, verdicts in ran.items() if verdicts == {PASSED}]
        faults = [part for part, verdicts in ran.items() if verdicts & set(FAULTS)]
        return f"{len(passed)} of {len(ran)}", ", ".join(faults)


def run(folders: Sequence[Path], out: Path) -> None:
    """`xr0 bench report FOLDER ...`. Raises ValueError for a folder that holds no run, or emulated beside real ones."""
    write_whole(out, page([load(folder) for folder in folders]))


def load(folder: Path) -> Machine:
    """Raises ValueError for a folder that holds no run, or a broken one."""
    state, facts = read(folder), printed(folder / FACTS)
    if facts is None:
        raise ValueError(f"{folder} holds no {FACTS}: the run there had not begun")
    return Machine(
        f"{machine_name(facts)} ({folder.absolute().name})", facts, state, [r for _, r in results_of(folder)]
    )


def page(machines: Sequence[Machine]) -> str:
    """Raises ValueError as report.check_unmixed."""
    check_unmixed({each.name: each.facts["environment"].get("emulated") for each in machines})
    commits = list(dict.fromkeys(each.commit for each in machines))
    notes = ""
    if any(each.facts["emulated"] is not None for each in machines):
        notes += f'<p class="warning">{escape(EMULATED)}</p>'
    if len(commits) > 1:
        notes += f'<p class="warning">Different commits: {escape(", ".join(commits))}.</p>'
    header = f"<h1>xr0-engine on {len(machines)} machines</h1>{notes}"
    return document("xr0-engine: machines side by side", header, f"{_machines(machines)}\n{_latencies(machines)}")


def _machines(machines: Sequence[Machine]) -> str:
    head = ["", "memory", "driver", "torch", "triton", "commit", "size", "parts passed", "failed"]
    rows = []
    for each in machines:
        gpu, known = each.facts["gpu"] or {}, each.facts["environment"]
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu else "–"
        versions = [str(known.get(name) or "–") for name in ("driver", "torch", "triton")]
        size = str(each.state.told.get("size", "–"))
        rows.append([each.name, memory, *versions, each.commit, size, *each.parts()])
    return f"<section><h2>Machines</h2>{table(head, rows)}</section>"


def _latencies(machines: Sequence[Machine]) -> str:
    """Grouped by case and boundary, a line for each machine and rival."""
    found: dict[str, list[list[str]]] = {}
    for each in machines:
        for row in latency_rows(each.results):
            who = each.name if row.rival == OURS else f"{each.name}: {row.rival}"
            group = f"{row.case}: {row.boundary}, {row.backend}"
            found.setdefault(group, []).append([who, each.commit, *row.cells])
    if not found:
        return ""
    rows = [row for group in sorted(found) for row in ([group], *found[group])]
    head = ["", "commit", *LATENCY_HEAD]
    return f'<section><h2>Latency</h2>{table(head, rows)}<p class="note">{escape(TOO_FEW)}</p></section>'
