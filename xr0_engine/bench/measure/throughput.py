"""Chunks per second against batch size, and of calls that wait for each other: all take turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.measure.eight_bits import weights_bytes
from xr0_engine.bench.measure.latency import GATE, relative_rms
from xr0_engine.bench.results import Result, environment, summary
from xr0_engine.bench.tell.tables import footer, number, precision
from xr0_engine.bench.timing import CallTimer, StageTimes, peak_memory_bytes, reset_peak_memory, run
from xr0_engine.fused.lookahead import Lookahead
from xr0_engine.fused.model import FusedModel
from xr0_engine.model.network import Network
from xr0_engine.types import ActionChunk, Inference

QUEUED = 8
"""Calls that wait for each other."""


def measure(setup: Setup, batches: Sequence[int], rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. Its series are `batch N`, in milliseconds per call; on a GPU
    with backend triton also `in turn` and `ahead`: QUEUED calls, without and with the next one's vision beside a flow.

    facts["batches"], facts["queues"]: series -> observations per call. Raises ValueError for a wrong argument,
    RuntimeError if a batch does not give the actions of its observations alone, or looking ahead others than without:
    nothing is timed then.
    """
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise ValueError(f"batches: expected different numbers from 1, got {list(batches)}")
    subject = Subject.load(replace(setup, case=replace(setup.case, batch=max(batches))))
    engine = subject.engine
    device = engine.model.device
    # infer ends with the actions on the host, so the wall clock is right on a GPU too.
    timer = CallTimer(torch.device("cpu"))
    _gate(subject, batches)

    def rival(batch: int) -> Callable[[], StageTimes]:
        return lambda: {"total": timer(lambda: _infer(subject, batch))}

    queues = _queues(subject)

    def queue(infer: Callable[[], list[ActionChunk]]) -> Callable[[], StageTimes]:
        return lambda: {"total": timer(infer)}

    reset_peak_memory(device)
    rivals = {f"batch {batch}": rival(batch) for batch in batches}
    series, reason = run(rivals | {name: queue(infer) for name, infer in queues.items()}, rounds)
    result = Result(
        kind="throughput",
        command=command,
        environment=environment(device),
        case=subject.describe(),
        boundary="infer",
        backend=engine.backend,
        series=series,
        facts={
            "batches": {f"batch {batch}": batch for batch in batches},
            "queues": dict.fromkeys(queues, QUEUED),
            "weights_bytes": weights_bytes(subject.plain_model()),
            "peak_memory_bytes": peak_memory_bytes(device),
        },
        complete=reason is None,
    )
    return result, reason


def _infer(subject: Subject, batch: int) -> np.ndarray:
    chunks = subject.engine.infer(subject.observations[:batch], subject.prefixes[:batch], subject.noise[:batch])
    return np.stack([chunk.normalized for chunk in chunks])


def _lookahead(model: Network) -> Lookahead | None:
    """The model's, a new one where its table has none, None for a model that cannot look ahead."""
    if not isinstance(model, FusedModel) or model.device.type != "cuda":
        return None
    return model.lookahead or Lookahead(model.device)


def _queues(subject: Subject) -> dict[str, Callable[[], list[ActionChunk]]]:
    """Both ways to infer QUEUED calls, once they have given the same. Raises RuntimeError if they do not."""
    engine, model = subject.engine, subject.engine.model
    lookahead = _lookahead(model)
    if lookahead is None:
        return {}
    calls = [Inference(subject.observations[0], subject.prefixes[0], seed=seed) for seed in range(QUEUED)]

    def infer(way: Lookahead | None) -> list[ActionChunk]:
        assert isinstance(model, FusedModel)
        before, model.lookahead = model.lookahead, way
        try:
            outcomes = list(engine.infer_all(calls))
        finally:
            model.lookahead = before
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        return [outcome for outcome in outcomes if isinstance(outcome, ActionChunk)]

    ways = {"in turn": lambda: infer(None), "ahead": lambda: infer(lookahead)}
    alone, ahead = (way() for way in ways.values())
    if not all(np.array_equal(one.actions, other.actions) for one, other in zip(alone, ahead, strict=True)):
        raise RuntimeError("nothing was timed: calls give other actions with the next one's vision beside their flow")
    return ways


def _gate(subject: Subject, batches: Sequence[int]) -> None:
    alone = _infer(subject, 1)[0]
    tolerance = GATE[subject.setup.dtype]
    for batch in batches:
        error = relative_rms(_infer(subject, batch)[0], alone)
        if not error < tolerance:
            raise RuntimeError(
                f"nothing was timed: in a batch of {batch}, the first observation's actions differ by {error:.1e} from "
                f"those that it gets alone, more than {tolerance:.0e}"
            )


def show(result: Result) -> None:
    case = result.case
    table = Table(title=f"{case['name']}, {case['size']}, {precision(case)}", box=None)
    for column in ("batch", "ms p50", "p90", "max", "ms per chunk", "chunks per second"):
        table.add_column(column, justify="right")
    named = {str(batch): (f"batch {batch}", batch) for batch in result.facts["batches"].values()}
    queues = {f"{calls} {name}": (name, calls) for name, calls in result.facts.get("queues", {}).items()}
    for label, (name, batch) in (named | queues).items():
        found = summary(result.series[name]["total"])
        p50 = found["p50"]
        assert p50 is not None
        table.add_row(
            label,
            number(p50),
            number(found["p90"]),
            number(found["max"]),
            number(p50 / batch),
            number(1000 * batch / p50),
        )
    console = Console()
    console.print(table)
    console.print(footer(result), markup=False, highlight=False)
