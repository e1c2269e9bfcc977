"""For each stage of a measured step: bound, time, share of the bound, and what to try next, by a fixed rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from xr0_engine.bench.results import Result
from xr0_engine.bench.tell.bounds import Bounds, same_case, same_machine

STAGES = ("vision", "prefill", "flow")
GOOD = 0.8
"""Share of the bound from which a stage is left alone."""


@dataclass(frozen=True)
class Advice:
    """Times in milliseconds, medians; reached: bound over time."""

    stage: str
    bound_ms: float
    time_ms: float
    reached: float
    next: str


def advise(result: Result, bounds: Bounds, others: Iterable[Result]) -> list[Advice]:
    """One per stage of the engine that has a bound; none for results that are no latencies.

    The rule: leave what reaches GOOD. Else, where a kernels result of the same case, machine and backend tells how long
    each op takes and how often it runs, name what costs most above the bound: an op, or all that lies between the ops.
    """
    if result.kind != "latency":
        return []
    kernels = next((other for other in others if _tells(other, result)), None)
    found = []
    for stage in STAGES:
        samples = result.series.get("engine", {}).get(stage)
        if not samples or stage not in bounds.ms:
            continue
        time = float(np.median(samples))
        reached = bounds.ms[stage] / time
        if reached >= GOOD:
            told = f"leave it: it reaches {GOOD:.0%}"
        elif kernels is None:
            told = f"time its ops: xr0 bench kernels --case {result.case.get('name')} --backend {result.backend}"
        else:
            told = _largest(kernels.series[kernels.backend], kernels.facts, stage, time)
        found.append(Advice(stage, bounds.ms[stage], time, reached, told))
    return found


def _tells(other: Result, result: Result) -> bool:
    return (
        other.kind == "kernels"
        and other.backend == result.backend
        and "counts" in other.facts
        and same_case(result.case, other.case)
        and same_machine(result, other)
    )


def _largest(
    times_ms: Mapping[str, Sequence[float]], facts: Mapping[str, Mapping[str, float]], stage: str, time_ms: float
) -> str:
    names = [name for name in facts["counts"] if name.startswith(f"{stage}: ")]
    taken = {name: facts["counts"][name] * float(np.median(times_ms[name])) for name in names}
    least = {name: facts["counts"][name] * facts["bound_ms"][name] for name in names}
    between = time_ms - sum(taken.values())
    worst = max(names, key=lambda name: taken[name] - least[name], default=None)
    if worst is None or between > taken[worst] - least[worst]:
        return f"between its ops: {between:.3g} ms of launches, small ops and gaps"
    op = worst.removeprefix(f"{stage}: ")
    return (
        f"{op}: {facts['counts'][worst]:g} runs take {taken[worst]:.3g} ms, {taken[worst] - least[worst]:.3g} ms above "
        f"their bound ({least[worst] / taken[worst]:.0%} of it)"
    )
