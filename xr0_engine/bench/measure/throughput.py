"""Chunks per second against batch size: the batches take turns in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.measure.latency import GATE, relative_rms
from xr0_engine.bench.results import Result, environment, summary
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import CallTimer, StageTimes, peak_memory_bytes, reset_peak_memory, run


def measure(setup: Setup, batches: Sequence[int], rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. Its series are `batch N`, in milliseconds per call.

    facts["batches"]: series -> observations per call. Raises ValueError for a wrong argument, RuntimeError if a batch
    does not give the actions of its observations alone: nothing is timed then.
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

    reset_peak_memory(device)
    series, reason = run({f"batch {batch}": rival(batch) for batch in batches}, rounds)
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
            "peak_memory_bytes": peak_memory_bytes(device),
        },
        complete=reason is None,
    )
    return result, reason


def _infer(subject: Subject, batch: int) -> np.ndarray:
    chunks = subject.engine.infer(subject.observations[:batch], subject.prefixes[:batch], subject.noise[:batch])
    return np.stack([chunk.normalized for chunk in chunks])


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
    table = Table(title=f"{case['name']}, {case['size']}, {case['dtype']}", box=None)
    for column in ("batch", "ms p50", "p90", "max", "ms per chunk", "chunks per second"):
        table.add_column(column, justify="right")
    for name, batch in result.facts["batches"].items():
        found = summary(result.series[name]["total"])
        p50 = found["p50"]
        assert p50 is not None
        table.add_row(
            str(batch),
            number(p50),
            number(found["p90"]),
            number(found["max"]),
            number(p50 / batch),
            number(1000 * batch / p50),
        )
    console = Console()
    console.print(table)
    console.print(footer(result), markup=False, highlight=False)
