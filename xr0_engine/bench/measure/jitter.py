"""A control loop of fixed rate that infers in every tick: is each chunk there in time, and how steady is the beat?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from xr0_engine.bench.cases import Setup, Subject
from xr0_engine.bench.measure.eight_bits import weights_bytes
from xr0_engine.bench.results import PERCENTILES, Result, environment, summary
from xr0_engine.bench.tell.tables import footer, number, precision
from xr0_engine.bench.timing import WARM_UP, peak_memory_bytes, reset_peak_memory

MAX_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Beat:
    """What a loop did, in milliseconds, one per tick that ran: duration of the call, start after the tick was due.

    skipped: ticks that passed while a call ran over.
    """

    duration_ms: list[float]
    lateness_ms: list[float]
    skipped: int

    def missed(self, rate_hz: float) -> int:
        """Ticks without a chunk before the next tick: those that passed, and the calls that ran past their own."""
        ends = np.add(self.duration_ms, self.lateness_ms)
        return self.skipped + int((ends > 1000 / rate_hz).sum())


def beat(
    call: Callable[[], object],
    rate_hz: float,
    ticks: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    stopped: Callable[[BaseException], None] | None = None,
) -> Beat:
    """Call once per tick. A tick whose time has passed before the last call ended is skipped, never caught up.

    clock gives seconds, sleep takes them. stopped: as for timing.take_turns.
    """
    duration_ms: list[float] = []
    lateness_ms: list[float] = []
    skipped = tick = 0
    begin = clock()
    try:
        while tick < ticks:
            due = begin + tick / rate_hz
            while (left := due - clock()) > 0:
                sleep(left)
            start = clock()
            call()
            end = clock()
            duration_ms.append(1e3 * (end - start))
            lateness_ms.append(1e3 * (start - due))
            following = max(tick + 1, math.ceil((end - begin) * rate_hz))
            skipped += min(following, ticks) - (tick + 1)
            tick = following
    except BaseException as reason:
        if not duration_ms or stopped is None:
            raise
        stopped(reason)
    return Beat(duration_ms, lateness_ms, skipped)


def measure(setup: Setup, rate_hz: float, seconds: float, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. Its stages are `total` (the call) and `lateness` (its start).

    Raises ValueError for a wrong argument.
    """
    if not 0 < rate_hz <= 1000:
        raise ValueError(f"rate: expected more than 0, at most 1000 Hz, got {rate_hz}")
    if not 1 / rate_hz <= seconds <= MAX_SECONDS:
        raise ValueError(f"seconds: expected at least one tick ({1 / rate_hz:.3g}) and at most a day, got {seconds}")
    subject = Subject.load(setup)
    device = subject.engine.model.device
    for _ in range(WARM_UP):
        subject.infer()

    reset_peak_memory(device)
    reasons: list[BaseException] = []
    ticks = max(1, round(seconds * rate_hz))
    # No progress bar: its thread would disturb the beat.
    Console(stderr=True).print(f"a tick every {1000 / rate_hz:.1f} ms for {seconds:g} s")
    loop = beat(subject.infer, rate_hz, ticks, stopped=reasons.append)
    result = Result(
        kind="jitter",
        command=command,
        environment=environment(device),
        case=subject.describe(),
        boundary="infer",
        backend=subject.engine.backend,
        series={"engine": {"total": loop.duration_ms, "lateness": loop.lateness_ms}},
        facts={
            "rate_hz": rate_hz,
            "ticks": len(loop.duration_ms) + loop.skipped,
            "skipped_ticks": loop.skipped,
            "missed_deadlines": loop.missed(rate_hz),
            "weights_bytes": weights_bytes(subject.plain_model()),
            "peak_memory_bytes": peak_memory_bytes(device),
        },
        complete=not reasons,
    )
    return result, reasons[0] if reasons else None


def show(result: Result) -> None:
    facts = result.facts
    case = result.case
    title = f"{case['name']}, {case['size']}, {precision(case)}, {facts['rate_hz']:g} Hz, ms"
    table = Table(title=title, box=None)
    table.add_column("")
    for name in (*PERCENTILES, "max"):
        table.add_column(name.replace("_", "."), justify="right")
    for stage, label in (("total", "inference"), ("lateness", "start after its tick was due")):
        found = summary(result.series["engine"][stage])
        table.add_row(label, *(number(found[name]) for name in (*PERCENTILES, "max")))
    console = Console()
    console.print(table)
    console.print(
        f"{facts['missed_deadlines']} of {facts['ticks']} deadlines missed, {facts['skipped_ticks']} of them because "
        "the inference before still ran"
    )
    console.print(footer(result), markup=False, highlight=False)
