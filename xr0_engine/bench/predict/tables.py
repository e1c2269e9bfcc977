"""Tactic tables for chips that are not here: `xr0 bench tune --predict`.

Every key of a step is given the candidates of candidates.py, ranked by the model without their code, which takes a
moment. The best are compiled, from the top, as long as one of them might still win with its code read: what spills or
does not fit is left out. Keys that take most of the step come first, until the time is up; the rest keep their default.
Last, whole steps tell how the flow is to run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from xr0_engine.backend import resolve_dtype, triton_installed
from xr0_engine.bench.cases import Setup
from xr0_engine.bench.predict.code import Code, compiled_code
from xr0_engine.bench.predict.figures import Chip, find_chip
from xr0_engine.bench.predict.model import Launched, chain_seconds
from xr0_engine.bench.predict.step import LaunchOps, Op, compile_ops, predict_step, record, total_ms
from xr0_engine.bench.predict.work import fits, op_work
from xr0_engine.bench.results import current_commit, environment
from xr0_engine.bench.step import candidates
from xr0_engine.bench.step.recorder import META
from xr0_engine.bench.step.workload import Workload
from xr0_engine.fused.backends import LOOP, LOOP_STAGES, compiler_faults, loop_shapes
from xr0_engine.fused.ops import SHARED_LIMIT, Flow, FusedOps, Tactic, tactic_key
from xr0_engine.fused.paper import recording, schedule_runs, variant
from xr0_engine.fused.tactics import TacticTable, predicted_path, write_tactics

FLOWS: tuple[Flow, ...] = ("chained", "layered", "persistent", "streamed")
SCHEDULED = 4
"""Of the best tiles, so many are tried with other warps and stages."""
MOST_ALIKE = 2
"""Of a tile, tactics that differ in warps and stages alone: without their code they are as good as one."""
MOST_COMPILED, MOST_TRIED = 8, 12
"""Candidates of a key that are compiled; the same with those that are refused or spill."""
MATTERS = 0.98
"""A candidate must take less than this share of the default's time."""


@dataclass(frozen=True)
class Choice:
    """Of one key. microseconds: of those that were compiled, winner first."""

    tactic: Tactic
    default: Tactic
    microseconds: Mapping[str, float]


class Search:
    """Candidates' times for the ops of steps, on one chip."""

    def __init__(self, chip: Chip) -> None:
        self.chip, self._at = chip, chip.settings()[0]
        self._ops = FusedOps("triton", META, arch=chip.arch)
        self._refusals: tuple[type[Exception], ...] = (ValueError, NotImplementedError, *compiler_faults("triton"))
        self.codes: dict[Hashable, Code] = {}

    def choose(self, op: Op, kind: str, alike: Collection[Op] = ()) -> Choice:
        """kind: the op's own, or that of the stage of a flow loop that it is. alike: ops of the same key with something
        else around them, which the tactic has to be fit for as well."""
        default, barrier = self._ops.default(kind, op.shape, op.options), kind.startswith(LOOP)
        ranked = self._ranked(op, kind, default, barrier)
        found: dict[Tactic, float] = {}
        for tactic, least in _of_many_tiles(ranked)[:MOST_TRIED]:
            if len(found) >= MOST_COMPILED or (found and least >= min(found.values())):
                break
            if (code := self._code(op, tactic)) is not None and all(self._code(each, tactic) for each in alike):
                found[tactic] = self._seconds(op, tactic, code, barrier)
        if default not in found and (code := self._code(op, default)) is not None:
            found[default] = self._seconds(op, default, code, barrier)
        best = min(found, key=lambda tactic: found[tactic], default=default)
        if default in found and found[best] > MATTERS * found[default]:
            best = default
        ordered = sorted(found, key=lambda tactic: (tactic != best, found[tactic]))
        return Choice(best, default, {candidates.name(tactic): round(1e6 * found[tactic], 3) for tactic in ordered})

    def refuses(self, loop: Op) -> bool:
        """Whether it is a flow loop that cannot be compiled, spills, or does not fit."""
        if not loop.phases:
            return False
        try:
            code = compiled_code(loop.launches[-1], self.chip.arch)
        except self._refusals:
            return True
        return bool(code.spills) or code.shared > SHARED_LIMIT[self.chip.arch]

    def default_seconds(self, op: Op, kind: str) -> float:
        return self._seconds(op, self._ops.default(kind, op.shape, op.options), None, kind.startswith(LOOP))

    def _ranked(self, op: Op, kind: str, default: Tactic, barrier: bool) -> list[tuple[Tactic, float]]:
        def timed(tactics: Iterable[Tactic]) -> dict[Tactic, float]:
            return {
                tactic: self._seconds(op, tactic, None, barrier)
                for tactic in tactics
                if not tactic.library
                and schedule_runs(tactic.schedule, self.chip.arch)
                and fits(op_work(op.kind, op.shape, tactic), self.chip.arch)
            }

        found = timed(candidates.tiles(kind, op.shape, default, self.chip.processors))
        for tactic in sorted(found, key=lambda tactic: found[tactic])[:SCHEDULED]:
            found |= timed(candidates.schedules(kind, tactic))
        return sorted(found.items(), key=lambda pair: pair[1])

    def _seconds(self, op: Op, tactic: Tactic, code: Code | None, barrier: bool) -> float:
        work = op_work(op.kind, op.shape, tactic, op.arguments, op.options)
        launched = Launched(work, code, barrier=barrier)
        return chain_seconds([launched] * 3, self.chip, self._at)[-1].total_s

    def _code(self, op: Op, tactic: Tactic) -> Code | None:
        """None for what the kernel, the compiler or the chip refuses."""
        try:
            with recording() as recorded:
                LaunchOps(recorded, {}, self.chip.arch).call(op.kind, op.arguments, op.options, tactic)
            code = compiled_code(recorded[-1], self.chip.arch)
        except self._refusals:
            return None
        self.codes[variant(recorded[-1])] = code
        return code if not code.spills and code.shared <= SHARED_LIMIT[self.chip.arch] else None


def predicted_table(
    chip: Chip,
    setups: Sequence[Setup],
    minutes: float,
    done: Callable[[int, int, str], None],
) -> tuple[TacticTable, dict[str, Choice]]:
    """The table for a chip's compute capability, and each key's choice. setups: cases whose keys it has. minutes: after
    so many no further key is begun. done: called with the number of keys done, of all, and the next one.

    How the two streams of an overlap share a chip is not modelled: overlap is left to those who measure.
    """
    end = time.monotonic() + 60 * minutes
    given = [(setup, *Workload.of_case(setup, kept=True), resolve_dtype(setup.dtype)) for setup in setups]

    def ops_of(flow: Flow, tactics: Mapping[str, Tactic], kept: Collection[str] = ()) -> list[list[Op]]:
        return [record(config, work, dtype, tactics, chip, flow, kept) for _, config, work, dtype in given]

    search, counts = Search(chip), dict[str, int]()
    wanted: dict[str, tuple[Op, str]] = {}
    alike: dict[str, dict[Hashable, Op]] = {}
    for (_, _, _, dtype), ops in zip(given, ops_of("chained", {}), strict=True):
        for op in (op for op in ops if op.tactic is not None):
            key = tactic_key(op.kind, op.shape, dtype, op.options)
            wanted[key], counts[key] = (op, op.kind), counts.get(key, 0) + 1
            alike.setdefault(key, {})[op.variant] = op
    for ops in ops_of("persistent", {}):
        for op in (op for op in ops if op.phases):
            for key, (body, kind) in _stages(op).items():
                wanted[key], counts[key] = (body, kind), sum(phase.name == body.name for phase in op.phases)
    choices: dict[str, Choice] = {}
    for key in sorted(wanted, key=lambda key: -counts[key] * search.default_seconds(*wanted[key])):
        if time.monotonic() > end:
            break
        done(len(choices), len(wanted), key)
        others = {**alike.get(key, {})}
        others.pop(wanted[key][0].variant, None)
        choices[key] = search.choose(*wanted[key], others.values())
    done(len(choices), len(wanted), "whole steps")
    tactics = {key: choice.tactic for key, choice in choices.items() if choice.tactic != choice.default}
    kept = choices.keys() - tactics.keys()
    alone = {key: tactic for key, tactic in tactics.items() if not key.startswith(LOOP)}
    if len(alone) < len(tactics) and any(
        search.refuses(op) for ops in ops_of("persistent", tactics, kept) for op in ops
    ):
        # What fits alone need not fit in a loop, which has the registers of all its stages.
        tactics = alone
    measured: dict[str, Mapping[str, float]] = {key: choice.microseconds for key, choice in choices.items()}
    steps: dict[str, dict[str, float]] = {f"step {setup.case.name}": {} for setup in setups}
    possible: list[Flow] = []
    refusals: tuple[type[Exception], ...] = (NotImplementedError, *compiler_faults("triton"))
    for flow in FLOWS:
        try:
            given_ops = ops_of(flow, tactics, kept)
            for ops in given_ops:
                search.codes = compile_ops(ops, chip.arch, lambda *_: None, search.codes)
        except refusals:
            # Not for these sizes, or not for this chip.
            continue
        possible.append(flow)
        for name, ops in zip(steps, given_ops, strict=True):
            steps[name][flow] = round(1e3 * total_ms(predict_step(ops, chip, search.codes))[1], 1)
    best = min(possible, key=lambda flow: sum(told[flow] for told in steps.values()))
    if best not in ("layered", "persistent"):
        # Those of a loop's stages are for nobody.
        tactics = alone
    return TacticTable(f"sm_{chip.arch}", tactics, measured=measured | steps, flow=best, predicted=True), choices


def _of_many_tiles(ranked: Iterable[tuple[Tactic, float]]) -> list[tuple[Tactic, float]]:
    """Those among them that are the first MOST_ALIKE of their tile, whatever their warps and stages."""
    alike: dict[Tactic, int] = {}
    found = []
    for tactic, least in ranked:
        tile = replace(tactic, warps=0, stages=0)
        alike[tile] = alike.get(tile, 0) + 1
        if alike[tile] <= MOST_ALIKE:
            found.append((tactic, least))
    return found


def _stages(loop: Op) -> dict[str, tuple[Op, str]]:
    """Of a flow loop: key -> the op that a stage is, the stage's kind."""
    bodies = {(op.kind, op.shape): op for op in loop.phases}
    inputs, buffers = loop.arguments[1:3]
    found = {}
    for stage, shape in loop_shapes(inputs, buffers).items():
        if (body := bodies.get((LOOP_STAGES[stage], shape))) is not None:
            found[tactic_key(LOOP + stage, shape, buffers.q.dtype)] = body, LOOP + stage
    return found


def run(setups: Sequence[Setup], chip_name: str, minutes: float, out: Path | None) -> None:
    """`xr0 bench tune --predict`, of setups' cases. Writes the table and tells what it holds. out: instead of the
    package's own folder.

    Raises ValueError for a chip that is not known, NotImplementedError without Triton.
    """
    chip = find_chip(chip_name)
    if not triton_installed():
        raise NotImplementedError("predicting compiles kernels and needs Triton: pip install 'xr0-engine[cuda]'")
    path = out or predicted_path(Path(__file__).parents[2] / "tactics", chip.arch)
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("predicting", total=None)

        def done(number: int, of: int, key: str) -> None:
            progress.update(task, completed=number, total=of, description=key)
            progress.refresh()

        table, choices = predicted_table(chip, setups, minutes, done)
    versions = {name: environment("cpu")[name] for name in ("torch", "triton")}
    told = {**versions, "commit": current_commit(), "chip": chip.name, "cases": [setup.case.name for setup in setups]}
    write_tactics(replace(table, environment=told), path)
    for name, times in table.measured.items():
        if name.startswith("step "):
            print(f"{name}: {', '.join(f'{flow} {us / 1000:.2f} ms' for flow, us in times.items())}")
    print(
        f"{len(table.tactics)} of {len(choices)} ops with another tactic than the default; flow {table.flow}; predicted"
    )
    print(f"wrote {path}")
