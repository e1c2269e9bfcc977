"""What each feature of the GPU path buys: the engine's step, and the same step without one of them, taking turns.

All of them share one model's weights; each has buffers and graphs of its own, made with another tactic table or switch.
A variant must give the engine's chunk before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xr0_engine.backend import resolve_backend
from xr0_engine.bench.cases import Setup, StepInputs, Subject
from xr0_engine.bench.measure.latency import GATE, relative_rms
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import CallTimer, StageTimes, ratio_with_spread, run
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import has_dependent_launch, without_dependent_launch
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable

ENGINE, TOTAL = "engine", "total"


@dataclass(frozen=True)
class Variant:
    """The engine's step with one thing otherwise: its tactic table, whether it is a graph, what it is launched in.

    instead: in words. scope: entered when its kernels are launched or captured.
    """

    instead: str
    table: TacticTable
    graphs: bool
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


def variants(model: FusedModel) -> dict[str, Variant]:
    """What the engine does on this machine -> the engine without it."""
    table, on_gpu = model.table, model.device.type == "cuda"
    found = {}
    if model.graphs:
        found["CUDA graph"] = Variant("every kernel is launched from the host", table, graphs=False)
    if table.tactics:
        defaults = replace(table, tactics={})
        found["measured tactics"] = Variant("kernels run with their stated defaults", defaults, model.graphs)
    if on_gpu and has_dependent_launch(model.device):
        instead = "a kernel starts when the one before it has ended"
        found["dependent launch"] = Variant(instead, table, model.graphs, without_dependent_launch)
    if on_gpu:
        beside = "the flow's first step runs beside the VLM's last layers"
        after = "the flow starts when the prefill has ended"
        name, instead = ("overlap", after) if table.overlap else ("flow after prefill", beside)
        found[name] = Variant(instead, replace(table, overlap=not table.overlap), model.graphs)
    if model.backend == "triton":
        chained, persistent = "the flow is a chain of kernels", "the flow is one kernel"
        name, instead = ("persistent flow", chained) if table.flow == "persistent" else ("chained flow", persistent)
        flow = replace(table, flow="chained" if table.flow == "persistent" else "persistent", overlap=False)
        found[name] = Variant(instead, flow, model.graphs)
    return found


def step_of(model: FusedModel, given: StepInputs, variant: Variant) -> tuple[Session, Callable[[], None]]:
    """Its buffers, inputs uploaded, and its step on them: run once, so that kernels and graph are there."""
    session = Session(model, session_key(given.inputs), given.inputs, variant.table, variant.graphs)
    session.update(given.inputs, given.noise, given.prefix, given.prefix_length)

    def step() -> None:
        with variant.scope():
            session.replay()

    step()
    return session, step


@torch.inference_mode()
def measure_model(
    model: FusedModel, given: StepInputs, dtype: str, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float], BaseException | None]:
    """Series of the engine and of every variant, each variant's error against the engine, and what cut it short.

    Raises RuntimeError if a variant gives another chunk: nothing is timed then.
    """
    found = variants(model)
    engine, step = step_of(model, given, Variant("", model.table, model.graphs))
    steps, sessions, errors = {ENGINE: step}, [engine], {}
    for name, variant in found.items():
        session, steps[name] = step_of(model, given, variant)
        sessions.append(session)
        errors[name] = relative_rms(session.chunk.cpu().numpy(), engine.chunk.cpu().numpy())
        if not errors[name] < GATE[dtype]:
            raise RuntimeError(
                f"nothing was timed: without {name!r} the chunk differs by {errors[name]:.1e}, more than {GATE[dtype]}"
            )
    timer = CallTimer(model.device)

    def timed(step: Callable[[], None]) -> StageTimes:
        return {TOTAL: timer(step)}

    series, reason = run({name: partial(timed, step) for name, step in steps.items()}, rounds)
    for session in sessions:
        session.close()
    return series, errors, reason


def measure(setup: Setup, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did.

    Raises as Subject.load, NotImplementedError without a CUDA GPU, RuntimeError if a variant gives other actions.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    device = setup.prepare()
    if device.type != "cuda":
        raise NotImplementedError(
            f"ablate measures backend 'triton' on a CUDA GPU, and the device is {device}; `xr0 bench latency` compares "
            "the engine with the released way anywhere"
        )
    resolve_backend("triton", device)
    subject = Subject.load(replace(setup, backend="triton"))
    model = subject.fused_model()
    series, errors, reason = measure_model(model, subject.step_inputs(), setup.dtype, rounds)
    found = variants(model)
    result = Result(
        kind="ablate",
        command=command,
        environment=environment(model.device),
        case=subject.describe(),
        boundary="replay",
        backend=subject.engine.backend,
        series=series,
        facts={
            "stages": dict.fromkeys(found, TOTAL),
            "instead": {name: variant.instead for name, variant in found.items()},
            "error_against_engine": errors,
        },
        complete=reason is None,
    )
    return result, reason


def show(result: Result) -> None:
    """A table of 80 columns."""
    case, facts = result.case, result.facts
    table = Table(title=f"{case['name']}, {case['size']}, batch {case['batch']}, {case['dtype']}, ms", box=None)
    table.add_column("without")
    for column in ("ms", "with", "bought", "ratio", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    engine = np.array(result.series[ENGINE][TOTAL])
    for name in facts["instead"]:
        without = np.array(result.series[name][TOTAL])
        middle, low, high = ratio_with_spread(without, engine)
        medians = number(float(np.median(without))), number(float(np.median(engine)))
        bought = f"{np.median(without - engine):+.3f}"
        table.add_row(name, *medians, bought, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}")
    console = Console()
    console.print(table)
    for name, instead in facts["instead"].items():
        console.print(f"without {name}: {instead}", highlight=False)
    console.print("Where the quartiles enclose 1, the machine's noise hides what is bought.")
    console.print(footer(result), markup=False, highlight=False)
