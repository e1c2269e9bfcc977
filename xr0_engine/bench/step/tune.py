"""Tactic tables: every op of a step, at the shapes of some cases, with every candidate of candidates.py.

The step runs once with the stated defaults; the first call of every tactic key is kept. Then each key's candidates run
on the very buffers of that call: a candidate must give what the default gives, and only then is it timed, in a chain of
the step's own calls around it (chain.py), by the device's own clock, its L2 cache overwritten before. The keys that
take most of the step come first, until the time is up; the rest keep their default. Last, whole steps take turns:
defaults, winners, and winners with other ways to run the flow. The table holds what wins there.

The table is written after every key, so that a run that is cut short leaves what it measured, for the engine to use and
for the next run to go on from.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from xr0_engine.backend import resolve_backend
from xr0_engine.bench.cases import Case, Setup, StepInputs, Subject
from xr0_engine.bench.measure.latency import GATE as STEP_GATE
from xr0_engine.bench.measure.latency import relative_rms
from xr0_engine.bench.results import current_commit, environment
from xr0_engine.bench.step import candidates
from xr0_engine.bench.step.chain import Chain, Timer, chain_of
from xr0_engine.bench.step.kernels import GATE
from xr0_engine.bench.step.race import FULL, ONCE, Effort, Outcome, race
from xr0_engine.bench.step.recorder import RecordingOps
from xr0_engine.bench.timing import CallTimer, take_turns
from xr0_engine.env import emulated_arch
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.paper import compile_beside
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable, gpu_name, own_folder, read_tactics, write_tactics

OVERLAPS = (8, 4)
"""Of the VLM's last layers, beside which the flow's first step is tried, besides all that it reads."""
SAME = ("device", "driver", "torch", "triton", "commit", "emulated")
"""What must be as it was for an earlier run's times to be gone on from."""
UNFINISHED = "unfinished"
"""In a table's environment: key -> how many runs ended while they measured it."""
REFUSED = "refused"
"""In a table's environment: way to run the step -> why this machine cannot."""
MOST_TRIES = 2
"""A key in which so many runs ended keeps its default: one of its candidates may well have ended them."""


class Disagreement(RuntimeError):
    """A step with winners gives another chunk than with the defaults."""


@torch.inference_mode()
def tune(
    model: FusedModel,
    cases: Mapping[str, StepInputs],
    minutes: float,
    threads: int,
    done: Callable[[int, int, str], None],
    known: TacticTable | None = None,
    keep: Callable[[TacticTable], None] = lambda table: None,
    effort: Effort = FULL,
) -> tuple[TacticTable, dict[str, Outcome]]:
    """The table, and what each key's candidates took.

    cases: name -> what a step takes. minutes: after so many no further key is begun. threads: that compile. done:
    called with the number of keys done, of all, and the next one. known: of an earlier run in the same environment:
    its keys are not measured again. keep: given the table so far before and after each key. Raises Disagreement if the
    winners' step does not give the defaults' chunk.
    """
    dtype, timer = str(model.dtype).removeprefix("torch."), CallTimer(model.device)
    known = known or TacticTable(model.table.gpu)
    recording = RecordingOps(model.backend, model.device)
    for given in cases.values():
        _run_recorded(model, given, TacticTable(model.table.gpu), recording, threads)
    outcomes = _restored(recording, known)
    keys = _Keys(known, outcomes, keep)
    _race_all(recording, keys, timer, GATE[dtype], minutes, threads, done, effort)
    return _whole_steps(model, cases, keys.table(), timer, STEP_GATE[dtype], effort), outcomes


@dataclass
class _Keys:
    """Every key's outcome so far, and the table that they make beside what was known of other cases."""

    known: TacticTable
    outcomes: dict[str, Outcome]
    keep: Callable[[TacticTable], None]
    tries: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tries.update(self.known.environment.get(UNFINISHED, {}))

    def begin(self, key: str) -> None:
        self.tries[key] = self.tries.get(key, 0) + 1
        self.keep(self.table())

    def end(self, key: str, outcome: Outcome) -> None:
        self.outcomes[key] = outcome
        self.leave(key)

    def leave(self, key: str) -> None:
        """It did not end this run."""
        del self.tries[key]
        self.keep(self.table())

    def table(self) -> TacticTable:
        ours = self.outcomes
        others = {key: times for key, times in self.known.measured.items() if key not in ours}
        winners = {key: tactic for key, tactic in self.known.tactics.items() if key in others}
        winners |= {key: outcome.winner for key, outcome in ours.items() if outcome.winner != outcome.default}
        measured = {
            key: {candidates.name(tactic): round(us, 3) for tactic, us in outcome.microseconds.items()}
            for key, outcome in ours.items()
        }
        environment = {UNFINISHED: dict(self.tries)} if self.tries else {}
        return TacticTable(self.known.gpu, winners, measured={**others, **measured}, environment=environment)


def _restored(recording: RecordingOps, known: TacticTable) -> dict[str, Outcome]:
    """The outcomes that a table tells of, but for keys whose candidates are others today."""
    outcomes = {}
    for key, call in recording.calls.items():
        default = recording.default(call.kind, call.shape, call.options)
        tactics = candidates.named(call.kind, call.shape, default, _processors(recording.workspace.device))
        times = known.measured.get(key, {})
        if candidates.name(default) in times and times.keys() <= tactics.keys():
            microseconds = {tactics[name]: us for name, us in times.items()}
            outcomes[key] = Outcome(next(iter(microseconds)), default, call.count, microseconds)
    return outcomes


def _run_recorded(
    model: FusedModel, given: StepInputs, table: TacticTable, recording: RecordingOps, threads: int
) -> None:
    session = Session(model, session_key(given.inputs), given.inputs, table)
    session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
    if model.device.type == "cuda":
        compile_beside(session.run, threads)
    session.ops = session.flow_ops = recording
    # Not session.run, which may take two streams: the ops have the scratch memory of one.
    session.encode()
    session.prefill()
    session.sample()
    if model.has_loop:
        # A launch a layer, whose stages have keys of their own.
        session.table = replace(table, flow="layered")
        session.sample()


def _race_all(
    recording: RecordingOps,
    keys: _Keys,
    timer: Timer,
    gate: float,
    minutes: float,
    threads: int,
    done: Callable[[int, int, str], None],
    effort: Effort,
) -> None:
    """Those of which nothing is known, what takes most of the step first, until the time is up."""
    processors = _processors(recording.workspace.device)
    end = time.monotonic() + 60 * minutes

    def chain(key: str) -> Chain:
        return chain_of(recording, key, keys.table().tactics, effort.chain)

    def share(key: str) -> float:
        call = recording.calls[key]
        default = recording.default(call.kind, call.shape, call.options)
        return call.count * chain(key).microseconds(timer, [default], effort.quick)[default]

    total = len(recording.calls)
    unknown = [key for key in recording.calls if key not in keys.outcomes and keys.tries.get(key, 0) < MOST_TRIES]
    shares = {key: share(key) for key in unknown} if minutes > 0 else {}
    for key in sorted(shares, key=lambda key: -shares[key]):
        if time.monotonic() > end:
            break
        done(len(keys.outcomes), total, key)
        keys.begin(key)
        try:
            call = recording.calls[key]
            outcome = race(recording, call, chain(key), processors, timer, gate, threads, effort)
        except KeyboardInterrupt:
            keys.leave(key)
            raise
        keys.end(key, outcome)
    done(len(keys.outcomes), total, "whole steps")


def _whole_steps(
    model: FusedModel, cases: Mapping[str, StepInputs], table: TacticTable, timer: Timer, gate: float, effort: Effort
) -> TacticTable:
    """The table as its steps win: with or without its tactics, however the flow runs; with what each took."""
    rivals = _rivals(table, model)
    measured: dict[str, Mapping[str, float]] = {}
    refused: dict[str, str] = {}
    for case, given in cases.items():
        sessions = {}
        for name, rival in rivals.items():
            session = Session(model, session_key(given.inputs), given.inputs, rival)
            session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
            try:
                session.replay()
            except RuntimeError as reason:
                if rival.flow == "chained":
                    raise
                # Programs that wait for each other need a driver that starts all of them.
                refused[name] = str(reason).strip().partition("\n")[0]
            else:
                sessions[name] = session
        expected = sessions["default"].chunk.cpu().numpy()
        for name, session in sessions.items():
            error = relative_rms(session.chunk.cpu().numpy(), expected)
            if not error < gate:
                raise Disagreement(f"{case}, {name}: the chunk differs from the defaults' by {error:.1e}, over {gate}")
        calls = {name: (lambda session=session: {"total": timer(session.replay)}) for name, session in sessions.items()}
        samples = take_turns(calls, effort.rounds, effort.quick)
        measured[f"step {case}"] = {name: round(1e3 * float(np.median(s["total"])), 1) for name, s in samples.items()}
        for session in sessions.values():
            session.close()
    ran = [name for name in rivals if name not in refused]
    totals = {name: sum(times[name] for times in measured.values()) for name in ran}
    best = min(ran, key=totals.__getitem__)
    told = {REFUSED: refused} if refused else {}
    return replace(rivals[best], measured={**table.measured, **measured}, environment={**table.environment, **told})


def _rivals(table: TacticTable, model: FusedModel) -> dict[str, TacticTable]:
    """Name -> table: the defaults first."""
    rivals = {"default": TacticTable(table.gpu), "tuned": table, "tuned, overlap": replace(table, overlap=True)}
    layers = model.config.head.num_layers
    for few in OVERLAPS:
        if few < layers:
            rivals[f"tuned, overlap {few}"] = replace(table, overlap=few)
    if model.has_loop:
        rivals |= {f"tuned, {flow} flow": replace(table, flow=flow) for flow in ("layered", "persistent", "streamed")}
    return rivals


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; elsewhere cores, which only decides what is tried."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return len(os.sched_getaffinity(0))


def run(setup: Setup, cases: Sequence[Case], minutes: float, out: Path | None) -> None:
    """`xr0 bench tune`. Writes the table for this GPU and prints what was gained.

    out: instead of XR0_CACHE/tactics/<gpu>.json, where the engine looks; a table there that the same commit measured in
    the same environment is gone on from, another is replaced. Raises ValueError for a wrong argument or a table that
    cannot be read, NotImplementedError without a CUDA GPU, Disagreement if a kernel computes something else: no table
    is left then.
    """
    if not cases:
        raise ValueError("case: expected at least one, got none")
    if not 0 < minutes <= 60:
        raise ValueError(f"minutes: expected more than 0, at most 60, got {minutes:g}")
    device, arch = setup.prepare(), emulated_arch()
    if device.type != "cuda" and arch is None:
        raise NotImplementedError(f"tuning measures kernels on a CUDA GPU, and the device is {device}")
    resolve_backend("triton", device)
    name = gpu_name(device) if arch is None else f"emulated-sm-{arch}"
    path = out or own_folder() / f"{name}.json"
    told = environment(device) | {
        "commit": current_commit(),
        "size": setup.size,
        "cases": [case.name for case in cases],
    }
    known = _gone_on_from(path, told)
    subject = Subject.load(replace(setup, backend="triton", case=cases[0]))
    model = subject.fused_model()
    inputs = {case.name: subject.with_case(case).step_inputs() for case in cases}

    def keep(table: TacticTable) -> None:
        write_tactics(replace(table, gpu=name, environment={**told, **table.environment}), path)

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("tuning", total=None)

        def done(number: int, total: int, key: str) -> None:
            progress.update(task, completed=number, total=total, description=key)
            progress.refresh()

        effort = FULL if arch is None else ONCE
        threads = len(os.sched_getaffinity(0))
        try:
            table, outcomes = tune(model, inputs, minutes, threads, done, known, keep, effort)
        except Disagreement:
            # The engine must not run what was proven wrong.
            path.unlink(missing_ok=True)
            raise
    keep(table)
    show(table, outcomes)
    Console().print(f"wrote {path}", markup=False, highlight=False)


def _gone_on_from(path: Path, told: Mapping[str, Any]) -> TacticTable | None:
    """What an earlier run left there, if all was as told now."""
    if not path.is_file():
        return None
    table = read_tactics(path)
    return table if all(table.environment.get(name) == told.get(name) for name in SAME) else None


def _layers(overlap: bool | int) -> str:
    return ("on" if overlap else "off") if isinstance(overlap, bool) else f"of {overlap} layers"


def show(table: TacticTable, outcomes: Mapping[str, Outcome]) -> None:
    view = Table("op", "winner", "us", "default", "saved us / step", "tried", "refused", box=None)
    for key, outcome in sorted(outcomes.items(), key=lambda item: -item[1].saved_us):
        won, plain = outcome.microseconds[outcome.winner], outcome.microseconds[outcome.default]
        told = candidates.name(outcome.winner) if outcome.winner != outcome.default else "the default"
        numbers = (f"{won:.1f}", f"{plain:.1f}", f"{outcome.saved_us:.0f}")
        view.add_row(key, told, *numbers, str(len(outcome.microseconds)), str(len(outcome.refused)))
    console = Console()
    console.print(view)
    for key, times in table.measured.items():
        if key.startswith("step "):
            told = ", ".join(f"{name} {us / 1000:.3f} ms" for name, us in times.items())
            console.print(f"{key}: {told}", highlight=False)
    for name, reason in table.environment.get(REFUSED, {}).items():
        console.print(f"{name}: refused here: {reason}", markup=False, highlight=False)
    kept = "the winners" if table.tactics else "the defaults, which no table beat"
    console.print(f"The table holds {kept}; overlap {_layers(table.overlap)}; {table.flow} flow.", highlight=False)
