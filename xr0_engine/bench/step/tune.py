"""Tactic tables: every op of a step, at the shapes of some cases, with every candidate of candidates.py.

The step runs once with the stated defaults; the first call of every tactic key is kept. Then each key's candidates run
on the very buffers of that call: a candidate must give what the default gives, and only then is it timed, by the
device's own clock, its L2 cache overwritten before. The keys that take most of the step come first, until the time is
up; the rest keep their default. Last, whole steps take turns: defaults, winners, and winners with the flow's first step
beside the VLM's last layers. The table holds what wins there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

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
from xr0_engine.bench.step.kernels import GATE
from xr0_engine.bench.step.recorder import Call, RecordingOps
from xr0_engine.bench.timing import CallTimer, take_turns
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import FusedOps, Tactic, compile_beside
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable, gpu_name, own_folder, write_tactics

QUICK, LONG = 7, 30
"""Launches of a candidate; of a finalist."""
FINALISTS = 3
MARGIN = 0.02
"""By how much a candidate must beat the default: less is noise."""
STEP_ROUNDS = 100
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


class Trial:
    """One call, tried with one tactic after the other. Leaves its buffers as they were."""

    def __init__(self, ops: FusedOps, call: Call, default: Tactic, gate: float, judge: FusedOps | None = None) -> None:
        """gate: relative RMS between a candidate's outputs and the default's. judge: other ops that say what is
        right."""
        self.ops, self.call, self.gate = ops, call, gate
        self._outputs = call.written()
        self._before = [output.clone() for output in self._outputs]
        self._reset()
        (judge or ops).call(call.kind, call.arguments, call.options, default)
        self._expected = [output.float() for output in map(torch.clone, self._outputs)]

    def fault(self, tactic: Tactic) -> str | None:
        """Why a tactic cannot take part, None if it gives what the default gives."""
        self._reset()
        if reason := self.ops.refusal(self.call.kind, self.call.arguments, self.call.options, tactic):
            return reason
        for output, expected in zip(self._outputs, self._expected, strict=True):
            error = float((output.float() - expected).norm() / expected.norm().clamp(min=1e-30))
            if not error < self.gate:
                return f"differs from what is right by {error:.1e}"
        return None

    def microseconds(self, timer: Timer, tactics: Sequence[Tactic], launches: int) -> dict[Tactic, float]:
        """Medians; the tactics take turns."""
        samples: dict[Tactic, list[float]] = {tactic: [] for tactic in tactics}
        for _ in range(launches):
            for tactic in tactics:
                samples[tactic].append(1e3 * timer(lambda tactic=tactic: self._run(tactic)))  # type: ignore[misc]
        return {tactic: float(np.median(taken)) for tactic, taken in samples.items()}

    def restore(self) -> None:
        for output, before in zip(self._outputs, self._before, strict=True):
            output.copy_(before)

    def _reset(self) -> None:
        """What is also read gets its value back; what is only written gets NaN, so that a gap shows."""
        both = self.call.read_and_written()
        for output, before in zip(self._outputs, self._before, strict=True):
            if output.data_ptr() in both:
                output.copy_(before)
            else:
                output.fill_(torch.nan)

    def _run(self, tactic: Tactic) -> None:
        self.ops.call(self.call.kind, self.call.arguments, self.call.options, tactic)


@dataclass
class Outcome:
    """Of one key. microseconds: of every candidate that took part, the winner first; refused: why others did not."""

    winner: Tactic
    default: Tactic
    count: int
    microseconds: dict[Tactic, float] = field(default_factory=dict)
    refused: dict[Tactic, str] = field(default_factory=dict)

    @property
    def saved_us(self) -> float:
        """Of a whole step."""
        return self.count * (self.microseconds[self.default] - self.microseconds[self.winner])


def race(ops: FusedOps, call: Call, processors: int, timer: Timer, gate: float, threads: int) -> Outcome:
    """Find the fastest tactic of one call. threads: that compile."""
    default = ops.default(call.kind, call.shape)
    outcome, trial = Outcome(default, default, call.count), Trial(ops, call, default, gate)

    def take(entrants: Sequence[Tactic]) -> None:
        _compile(ops, call, entrants, threads)
        for tactic in entrants:
            if reason := trial.fault(tactic):
                outcome.refused[tactic] = reason
            else:
                outcome.microseconds |= trial.microseconds(timer, [tactic], QUICK)

    def ranked() -> list[Tactic]:
        return sorted(outcome.microseconds, key=outcome.microseconds.__getitem__)

    take(candidates.tiles(call.kind, call.shape, default, processors))
    own = [tactic for tactic in ranked() if not tactic.library]
    take([tactic for tactic in candidates.schedules(own[0]) if tactic not in outcome.microseconds])
    finalists = list(dict.fromkeys((default, *ranked()[:FINALISTS])))
    outcome.microseconds |= trial.microseconds(timer, finalists, LONG)
    trial.restore()
    best = min(finalists, key=outcome.microseconds.__getitem__)
    if outcome.microseconds[best] < (1 - MARGIN) * outcome.microseconds[default]:
        outcome.winner = best
    order = (outcome.winner, *ranked())
    outcome.microseconds = {tactic: outcome.microseconds[tactic] for tactic in dict.fromkeys(order)}
    return outcome


def _compile(ops: FusedOps, call: Call, entrants: Sequence[Tactic], threads: int) -> None:
    """Ahead, several at a time: compiling takes far longer than everything else here."""
    if ops.workspace.device.type != "cuda":
        return

    def launch_all() -> None:
        for tactic in entrants:
            if not tactic.library:
                ops.refusal(call.kind, call.arguments, call.options, tactic)

    compile_beside(launch_all, threads)


@torch.inference_mode()
def tune(
    model: FusedModel,
    cases: Mapping[str, StepInputs],
    minutes: float,
    threads: int,
    done: Callable[[int, int, str], None],
) -> tuple[TacticTable, dict[str, Outcome]]:
    """The table, and what each key's candidates took.

    cases: name -> what a step takes. minutes: after so many no further key is begun. threads: that compile. done:
    called with the number of keys done, of all, and the next one. Raises RuntimeError if the winners' step does not
    give the defaults' chunk: then nothing is to be written.
    """
    dtype, timer = str(model.dtype).removeprefix("torch."), CallTimer(model.device)
    defaults = TacticTable(model.table.gpu)
    recording = RecordingOps(model.backend, model.device)
    for given in cases.values():
        _run_recorded(model, given, defaults, recording, threads)
    outcomes = _outcomes(recording, timer, GATE[dtype], minutes, threads, done)
    winners = {key: outcome.winner for key, outcome in outcomes.items() if outcome.winner != outcome.default}
    measured = {
        key: {candidates.name(tactic): round(us, 3) for tactic, us in outcome.microseconds.items()}
        for key, outcome in outcomes.items()
    }
    table = replace(defaults, tactics=winners, measured=measured)
    return _whole_steps(model, cases, table, timer, STEP_GATE[dtype]), outcomes


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


def _outcomes(
    recording: RecordingOps,
    timer: Timer,
    gate: float,
    minutes: float,
    threads: int,
    done: Callable[[int, int, str], None],
) -> dict[str, Outcome]:
    processors = _processors(recording.workspace.device)
    end = time.monotonic() + 60 * minutes

    def share(call: Call) -> float:
        default = recording.default(call.kind, call.shape)
        trial = Trial(recording, call, default, gate)
        taken = trial.microseconds(timer, [default], QUICK)[default]
        trial.restore()
        return call.count * taken

    shares = {key: share(call) for key, call in recording.calls.items()}
    outcomes: dict[str, Outcome] = {}
    for number, key in enumerate(sorted(shares, key=lambda key: -shares[key])):
        if time.monotonic() > end:
            break
        done(number, len(shares), key)
        outcomes[key] = race(recording, recording.calls[key], processors, timer, gate, threads)
    done(len(outcomes), len(shares), "whole steps")
    return outcomes


def _whole_steps(
    model: FusedModel, cases: Mapping[str, StepInputs], table: TacticTable, timer: Timer, gate: float
) -> TacticTable:
    """The table as its steps win: with or without its tactics, overlap, a persistent flow; with what each took."""
    defaults = TacticTable(table.gpu)
    rivals = {"default": defaults, "tuned": table, "tuned, overlap": replace(table, overlap=True)}
    if model.backend == "triton":
        # The reference has no such kernel.
        rivals["tuned, persistent flow"] = replace(table, flow="persistent")
    measured: dict[str, Mapping[str, float]] = {}
    for case, given in cases.items():
        sessions = {}
        for name, rival in rivals.items():
            session = Session(model, session_key(given.inputs), given.inputs, rival)
            session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
            session.replay()
            sessions[name] = session
        expected = sessions["default"].chunk.cpu().numpy()
        for name, session in sessions.items():
            error = relative_rms(session.chunk.cpu().numpy(), expected)
            if not error < gate:
                raise RuntimeError(f"{case}, {name}: the chunk differs from the defaults' by {error:.1e}, over {gate}")
        calls = {name: (lambda session=session: {"total": timer(session.replay)}) for name, session in sessions.items()}
        samples = take_turns(calls, STEP_ROUNDS, QUICK)
        measured[f"step {case}"] = {name: round(1e3 * float(np.median(s["total"])), 1) for name, s in samples.items()}
        for session in sessions.values():
            session.close()
    totals = {name: sum(times[name] for times in measured.values()) for name in rivals}
    best = "default"
    for name in list(rivals)[1:]:
        if totals[name] < totals[best]:
            best = name
    return replace(rivals[best], measured={**measured, **table.measured})


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; elsewhere cores, which only decides what is tried."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return len(os.sched_getaffinity(0))


def run(setup: Setup, cases: Sequence[Case], minutes: float, out: Path | None) -> None:
    """`xr0 bench tune`. Writes the table for this GPU, whole, and prints what was gained.

    out: instead of XR0_CACHE/tactics/<gpu>.json, where the engine looks. Raises ValueError for a wrong argument,
    NotImplementedError without a CUDA GPU, RuntimeError if a kernel computes something else.
    """
    if not cases:
        raise ValueError("case: expected at least one, got none")
    if not 0 < minutes <= 60:
        raise ValueError(f"minutes: expected more than 0, at most 60, got {minutes:g}")
    device = setup.prepare()
    if device.type != "cuda":
        raise NotImplementedError(f"tuning measures kernels on a CUDA GPU, and the device is {device}")
    resolve_backend("triton", device)
    subject = Subject.load(replace(setup, backend="triton", case=cases[0]))
    model = subject.fused_model()
    inputs = {case.name: subject.with_case(case).step_inputs() for case in cases}
    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("tuning", total=None)

        def done(number: int, total: int, key: str) -> None:
            progress.update(task, completed=number, total=total, description=key)
            progress.refresh()

        table, outcomes = tune(model, inputs, minutes, len(os.sched_getaffinity(0)), done)
    told = environment(device) | {
        "commit": current_commit(),
        "size": setup.size,
        "cases": [case.name for case in cases],
    }
    path = out or own_folder() / f"{gpu_name(device)}.json"
    write_tactics(replace(table, environment=told), path)
    show(table, outcomes)
    Console().print(f"wrote {path}", markup=False, highlight=False)


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
    kept = "the winners" if table.tactics else "the defaults, which no table beat"
    console.print(
        f"The table holds {kept}; overlap {'on' if table.overlap else 'off'}; {table.flow} flow.", highlight=False
    )
