"""What each feature of the GPU path buys: the engine's step, and the same step without one of them, taking turns.

All of them share one model's weights; each has buffers and graphs of its own, made with another tactic table or switch.
A variant must give the engine's chunk before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xr0_engine.backend import resolve_backend
from xr0_engine.bench.cases import Setup, StepInputs, Subject
from xr0_engine.bench.measure.latency import GATE, Rival, relative_rms
from xr0_engine.bench.measure.replay import engine_rival
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import ratio_with_spread, run
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.ops import has_dependent_launch, without_dependent_launch
from xr0_engine.fused.prompts import session_key
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable

ENGINE, TOTAL = "engine", "total"
Found = TypeVar("Found")


@dataclass(frozen=True)
class Variant:
    """The engine's step with one thing otherwise: its tactic table, whether it is a graph, what it is launched in.

    instead: in words. stage: where it should tell. scope: entered when its kernels are launched or captured.
    """

    instead: str
    table: TacticTable
    graphs: bool
    stage: str = TOTAL
    scope: Callable[[], AbstractContextManager[None]] = nullcontext


def features(model: FusedModel) -> dict[str, Any]:
    """What the engine's own step has on this machine."""
    on_gpu, table = model.device.type == "cuda", model.table
    overlap = on_gpu and table.overlap
    return {
        "CUDA graph": model.graphs,
        _tactics(table): len(table.tactics),
        "dependent launch": on_gpu and has_dependent_launch(model.device),
        "overlap": overlap,
        # Beside the VLM it is chained, whatever the table says.
        "flow": "chained" if overlap else table.flow,
    }


def _tactics(table: TacticTable) -> str:
    """What they are called, by where they come from."""
    return f"{'predicted' if table.predicted else 'measured'} tactics"


def variants(model: FusedModel) -> dict[str, Variant]:
    """What the engine does on this machine -> the engine without it."""
    has, table, graphs = features(model), model.table, model.graphs
    chained, persistent = (replace(table, overlap=False, flow=flow) for flow in ("chained", "persistent"))
    found = {}
    if graphs:
        found["CUDA graph"] = Variant("every kernel is launched from the host", table, graphs=False)
    if table.tactics:
        found[_tactics(table)] = Variant("kernels have their stated defaults", replace(table, tactics={}), graphs)
    if has["dependent launch"]:
        instead = "a kernel starts when the one before it has ended"
        found["dependent launch"] = Variant(instead, table, graphs, scope=without_dependent_launch)
    if has["overlap"]:
        found["overlap"] = Variant("the flow starts when the prefill has ended", chained, graphs)
    elif model.device.type == "cuda":
        instead = "the flow's first step, chained, runs beside the VLM's last layers"
        found["flow after prefill"] = Variant(instead, replace(table, overlap=True), graphs)
    if has["flow"] != "chained":
        found[f"{has['flow']} flow"] = Variant("the flow is a chain of kernels", chained, graphs, "flow")
    elif model.has_loop:
        found["chained flow"] = Variant("the flow is one kernel, after the prefill", persistent, graphs, "flow")
    return found


def rival_of(model: FusedModel, given: StepInputs, variant: Variant) -> tuple[Session, Rival]:
    """Its buffers; what is timed, the step and each stage, and what gives the chunk."""
    session = Session(model, session_key(given.inputs), given.inputs, variant.table, variant.graphs)
    timed, chunk = engine_rival(session, given, "replay")

    def within(call: Callable[[], Found]) -> Callable[[], Found]:
        # The first call captures.
        def scoped() -> Found:
            with variant.scope():
                return call()

        return scoped

    return session, (within(timed), within(chunk))


@torch.inference_mode()
def measure_model(
    model: FusedModel, given: StepInputs, dtype: str, rounds: int
) -> tuple[dict[str, dict[str, list[float]]], dict[str, float], BaseException | None]:
    """Series of the engine and of every variant, each variant's error against the engine, and what cut it short.

    Raises RuntimeError if a variant gives another chunk: nothing is timed then.
    """
    every = {ENGINE: Variant("", model.table, model.graphs), **variants(model)}
    made = {name: rival_of(model, given, variant) for name, variant in every.items()}
    chunks = {name: chunk() for name, (_, (_, chunk)) in made.items()}
    ours = chunks.pop(ENGINE)
    errors = {name: relative_rms(chunk, ours) for name, chunk in chunks.items()}
    for name, error in errors.items():
        if not error < GATE[dtype]:
            raise RuntimeError(
                f"nothing was timed: without {name!r} the chunk differs by {error:.1e}, more than {GATE[dtype]}"
            )
    series, reason = run({name: timed for name, (_, (timed, _)) in made.items()}, rounds)
    for session, _ in made.values():
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
            "engine": features(model),
            "stages": {name: variant.stage for name, variant in found.items()},
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
    for column in ("without", "stage"):
        table.add_column(column)
    for column in ("ms", "with", "bought", "ratio", "quartiles"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, stage in facts["stages"].items():
        for place in dict.fromkeys((stage, TOTAL)):
            without, engine = (np.array(result.series[rival][place]) for rival in (name, ENGINE))
            middle, low, high = ratio_with_spread(without, engine)
            medians = number(float(np.median(without))), number(float(np.median(engine)))
            bought = f"{np.median(without - engine):+.3f}"
            table.add_row(name, place, *medians, bought, f"{middle:.2f}", f"{low:.2f} .. {high:.2f}")
    console = Console()
    console.print(table)
    for name, instead in facts["instead"].items():
        console.print(f"without {name}: {instead}", highlight=False)
    has = ", ".join(f"{feature} {told}" for feature, told in facts["engine"].items())
    console.print(f"The engine has: {has}.", highlight=False)
    console.print("Where the quartiles enclose 1, the machine's noise hides what is bought.")
    console.print(footer(result), markup=False, highlight=False)
