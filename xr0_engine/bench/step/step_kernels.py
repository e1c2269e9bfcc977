"""Every fused op of a step alone, with the tactics that the engine runs with, beside its bound on this machine.

What runs is a recorded step's own calls, on its buffers. Each must agree with its oracle before anything is timed.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import torch

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.measure.replay import REPLAYED
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.step.ceilings import highest, measure_ceilings
from xr0_engine.bench.step.kernels import GATE
from xr0_engine.bench.step.race import Trial
from xr0_engine.bench.step.recorder import Call, RecordingOps
from xr0_engine.bench.step.roofline import Precision, cost
from xr0_engine.bench.timing import CallTimer, run
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import FusedOps, Tactic
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session


@torch.inference_mode()
def recorded(model: FusedModel, subject: Subject) -> dict[str, dict[str, Call]]:
    """Stage -> key -> call, of a step of the subject's case."""
    given = subject.step_inputs()
    # Stages of a flow loop are no kernels of their own.
    chained = replace(model.table, flow="chained")
    session = Session(model, session_key(given.inputs), given.inputs, chained)
    session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
    calls = {}
    for stage, work in zip(REPLAYED, (session.encode, session.prefill, session.sample), strict=True):
        session.ops = session.flow_ops = RecordingOps(model.backend, model.device)
        work()
        calls[stage] = session.ops.calls
    return calls


def measure(setup: Setup, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, of kind kernels, and what cut it short, if anything did. facts["counts"]: runs in a step.

    Raises as Subject.load; NotImplementedError for a backend without fused ops; RuntimeError for a kernel that computes
    something else.
    """
    subject = Subject.load(setup)
    return measure_model(subject.fused_model(), subject, rounds, command)


@torch.inference_mode()
def measure_model(
    model: FusedModel, subject: Subject, rounds: int, command: str
) -> tuple[Result, BaseException | None]:
    device, dtype = model.device, subject.setup.dtype
    precision = Precision(dtype)
    ops, oracle = model.ops(), FusedOps("reference", device)
    ceilings, timer = measure_ceilings(device, dtype), CallTimer(device)
    trials: dict[str, tuple[Trial, Tactic]] = {}
    costs, counts = {}, {}
    for stage, calls in recorded(model, subject).items():
        for key, call in calls.items():
            name = f"{stage}: {key.rpartition(' ')[0]}"
            trial = Trial(ops, call, Tactic(), GATE[dtype], oracle)
            tactic = ops.entry(key) or ops.default(call.kind, call.shape, call.options)
            if fault := trial.fault(tactic):
                raise RuntimeError(f"nothing was timed: {name}: {fault}")
            trials[name] = trial, tactic
            costs[name], counts[name] = cost(replace(call, stage=stage, name=call.kind), precision), call.count

    def one_round() -> dict[str, float]:
        return {name: trial.microseconds(timer, [tactic], 1)[tactic] / 1e3 for name, (trial, tactic) in trials.items()}

    series, reason = run({model.backend: one_round}, rounds)
    ceilings = highest(ceilings, measure_ceilings(device, dtype)) if reason is None else ceilings
    result = Result(
        kind="kernels",
        command=command,
        environment=environment(device),
        case=subject.describe(),
        boundary="kernel",
        backend=model.backend,
        series=series,
        facts={
            "chip": ceilings.name,
            "ceilings": asdict(ceilings),
            "bound_ms": {name: 1e3 * replace(each, count=1).bound_s(ceilings) for name, each in costs.items()},
            "shapes": {name: f"{count} runs" for name, count in counts.items()},
            "counts": counts,
        },
        complete=reason is None,
    )
    return result, reason
