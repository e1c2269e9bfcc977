"""The step as CUDA graphs, beside the released way: from inputs on the device, or from inputs on the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xr0_engine.backend import resolve_backend
from xr0_engine.bench.cases import Setup, StepInputs, Subject
from xr0_engine.bench.timing import CallTimer, StageTimes, Stopwatch
from xr0_engine.fused.graph import GraphContents
from xr0_engine.fused.session import Session

if TYPE_CHECKING:
    from xr0_engine.bench.measure.baseline import ReleasedModel

REPLAYED = ("vision", "prefill", "flow")
"""Stages that have a graph of their own beside the whole step's."""
REPLAY_BOUNDARIES = ("replay", "update+replay")

Rival = tuple[Callable[[], StageTimes], Callable[[], np.ndarray]]
"""As latency.Rival."""


def check_graphs(setup: Setup, what: str) -> None:
    """Raises NotImplementedError where no graph can be captured: without a CUDA GPU, or on another backend."""
    device = setup.prepare()
    remedy = "it needs CUDA graphs, which backend 'triton' captures on a CUDA GPU"
    if device.type != "cuda":
        raise NotImplementedError(f"{what}: {remedy}; the device is {device}")
    if (backend := resolve_backend(setup.backend, device)) != "triton":
        raise NotImplementedError(f"{what}: {remedy}; the backend is {backend!r}, take --backend triton")


def session_of(subject: Subject) -> tuple[Session, StepInputs]:
    """The session of the subject's case, its inputs uploaded."""
    model, given = subject.fused_model(), subject.step_inputs()
    session = model.session(given.inputs)
    session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
    return session, given


def engine_rival(session: Session, given: StepInputs, boundary: str) -> Rival:
    """replay: the whole step and each stage, by the device's clock; update+replay: to the chunk on the host, by the
    wall clock."""

    def updated() -> np.ndarray:
        session.update(given.inputs, given.noise, given.prefix, given.prefix_length)
        session.replay()
        return session.chunk.cpu().numpy()

    if boundary == "update+replay":
        wall = CallTimer(torch.device("cpu"))
        return (lambda: {"total": wall(updated)}), updated
    timer = CallTimer(session.model.device)

    def replayed() -> StageTimes:
        stages = {stage: timer(partial(session.replay, stage)) for stage in REPLAYED}
        return {**stages, "total": timer(session.replay)}

    return replayed, updated


def released_rival(model: ReleasedModel, subject: Subject, boundary: str) -> Rival:
    """The same of the released way. replay: its tensors are on the device before; the total is taken without waiting
    between the stages."""
    engine, robot_type = subject.engine, subject.setup.case.robot_type
    host = model.prepare(
        subject.observations,
        engine.embodiment(robot_type),
        engine.statistics[robot_type],
        subject.noise,
        subject.prefixes,
    )

    def from_host() -> np.ndarray:
        return model.step(host).cpu().numpy()

    if boundary == "update+replay":
        wall = CallTimer(torch.device("cpu"))
        return (lambda: {"total": wall(from_host)}), from_host
    timer, inputs = CallTimer(model.device), host.on(model.device, model.dtype)

    def stepped() -> StageTimes:
        total = timer(lambda: model.step(inputs))
        clock = Stopwatch(model.device)
        model.step(inputs, clock.mark)
        clock.mark("flow")
        return {**{stage: clock.times()[stage] for stage in REPLAYED}, "total": total}

    return stepped, from_host


def captured(setup: Setup) -> dict[str, GraphContents]:
    """What the graphs of a case hold: `step` and each stage. Raises as check_graphs; RuntimeError from the driver."""
    check_graphs(setup, "graph")
    session, _ = session_of(Subject.load(setup))
    return {part: session.graph(part).contents() for part in ("step", *REPLAYED)}


def run(setup: Setup, as_json: bool) -> None:
    """`xr0 bench graph`. Raises as captured."""
    contents = captured(setup)
    if as_json:
        print(json.dumps({part: asdict(found) for part, found in contents.items()}))
    else:
        _show(contents)


def _show(contents: dict[str, GraphContents]) -> None:
    console = Console()
    parts = list(contents)
    for title, kind in (("nodes", "nodes"), ("kernels", "kernels")):
        table = Table(title, box=None)
        for part in parts:
            table.add_column(part, justify="right")
        names = dict.fromkeys(name for part in parts for name in getattr(contents[part], kind))
        for name in names:
            table.add_row(name, *(str(getattr(contents[part], kind).get(name, "")) for part in parts))
        console.print(table)
