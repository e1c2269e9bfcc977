"""The time of a launch: what each part of a chip takes for its work, and what waits for what.

A launch is a start, the filling of its pipelines, a body, in which matrix units, instructions, shared memory, L2 and
memory work at once, and an end of dependent trips to L2. Programs that do not all fit the chip at once come in waves.
Where the chip has dependent launch, the next kernel's blocks wait beside those that run, and their weights are on the
way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from xr0_engine.bench.predict.code import Code
from xr0_engine.bench.predict.figures import BLOCKS, REGISTERS, RESERVED_SHARED, Chip
from xr0_engine.bench.predict.work import Work

DEPENDENT_FROM = 90
"""As kernels/launch.py: DEPENDENT_LAUNCH_FROM."""
SCHEDULERS = 4
"""Of a processor: each issues one instruction a cycle."""
SHARED_BYTES_CYCLE = 128
"""Between registers and shared memory of a processor, all chips (datasheet)."""
SPECIAL_CYCLE = 16
"""Exponentials that a processor begins in a cycle, all chips (CUDA programming guide, arithmetic instructions)."""
ASSUMED_REGISTERS = 128
"""Of a thread, where no code says so."""
LOADS_AT_ONCE = 4
"""Parts of a split that are on their way together where the loop over them is rolled."""

Settings = Mapping[str, float]
"""Of figures.py: Figures, each as one number."""


class Time(NamedTuple):
    """Seconds of one launch, after the one ahead has ended. limit: what takes most of it. spare_s: in which memory has
    nothing to do."""

    start_s: float
    fill_s: float
    body_s: float
    end_s: float
    limit: str
    spare_s: float

    @property
    def total_s(self) -> float:
        return self.start_s + self.fill_s + self.body_s + self.end_s


@dataclass(frozen=True)
class Launched:
    """A launch to be timed. code: None, and instructions count for nothing. dependent: starts while the one ahead runs.
    barrier: no launch, but a stage of one, behind a barrier of the grid. streamed: what it reads from memory comes
    without its waiting for it; stream_share says what all such stages wait for together."""

    work: Work
    code: Code | None = None
    dependent: bool = True
    barrier: bool = False
    streamed: bool = False

    @property
    def warps(self) -> int:
        return self.code.warps if self.code else self.work.warps

    @property
    def takes(self) -> tuple[int, int, int]:
        """Of a processor, by one block: bytes of shared memory, threads, registers."""
        shared = (self.code.shared if self.code else self.work.shared) + RESERVED_SHARED
        # They are given out eight at a time.
        registers = -(-self.code.registers // 8) * 8 if self.code else ASSUMED_REGISTERS
        return shared, 32 * self.warps, 32 * self.warps * registers


def _has(chip: Chip) -> tuple[int, int, int]:
    """Of a processor, as Launched.takes."""
    return chip.shared_bytes, chip.threads, REGISTERS


def resident(launched: Launched, chip: Chip) -> int:
    """Blocks that a processor holds at once; at least one."""
    most = min(has // takes for has, takes in zip(_has(chip), launched.takes, strict=True))
    return 1 if launched.barrier else max(1, min(BLOCKS, most))


def _at_once(launched: Launched, chip: Chip) -> int:
    return min(resident(launched, chip), math.ceil(launched.work.programs / chip.processors))


def share_beside(first: Launched, second: Launched, chip: Chip) -> float:
    """Of the second's blocks on a processor, what fits beside those of the first: 0 to 1."""
    at_once = _at_once(first, chip)
    left = [has - at_once * takes for has, takes in zip(_has(chip), first.takes, strict=True)]
    fitting = max(0, min(has // takes for has, takes in zip(left, second.takes, strict=True)))
    beside = min(1.0, fitting / _at_once(second, chip))
    # Some processors may have none of the first.
    empty = max(0.0, 1 - first.work.programs / chip.processors)
    return empty + (1 - empty) * beside


def launch_time(launched: Launched, chip: Chip, at: Settings, ahead_share: float = 0.0) -> Time:
    """ahead_share: of what may be asked for ahead, what has arrived when the kernel ahead ends."""
    work, code, warps = launched.work, launched.code, launched.warps
    cycle = 1 / at["clock_hz"]
    l2_s, memory_s = at["l2_cycles"] * cycle, at["memory_cycles"] * cycle
    most = math.ceil(work.programs / chip.processors)
    # On average the busiest processor's programs are not all the busiest.
    load = 1 + (most - 1) * work.busy
    at_once = _at_once(launched, chip)
    waves = math.ceil(most / at_once)
    issue = SCHEDULERS * min(1.0, at["issue_share"] * at_once * warps / SCHEDULERS)

    from_memory = max(0.0, work.memory_bytes - ahead_share * work.ahead_bytes)
    # What comes during the wait at a barrier takes the rest of its own time alone.
    held = work.held_bytes / at["processor_bytes_cycle"] * cycle
    late = max(0.0, held - at["barrier_trips"] * l2_s) if launched.barrier else held
    parts = {
        "arithmetic": load * work.mma_operations / _rate(chip, code, at) * cycle,
        "L2": max(
            load * work.l2_bytes / at["processor_bytes_cycle"] * cycle + late,
            work.programs * work.busy * work.l2_bytes / at["l2_bytes_cycle"] * cycle,
        ),
        "memory": from_memory / at["memory_bytes_s"],
        "latency": waves * work.trips * (memory_s if from_memory else l2_s) / max(1, work.stages - 1),
    }
    special, end_cycles = work.special, 0.0
    if code:
        trips = work.trips
        if code.loop.mma_operations:
            # What is multiplied outside the loop is not multiplied in it as well: of few own keys or one step of cached
            # ones nothing is left for a loop that is there for more.
            left = max(0.0, work.mma_operations - code.outside.mma_operations * code.warps)
            trips = left / (code.loop.mma_operations * code.warps)
        parts["instructions"] = load * trips * warps * code.loop.instructions / issue * cycle
        parts["shared memory"] = load * trips * warps * code.loop.shared_bytes / SHARED_BYTES_CYCLE * cycle
        special = warps * 32 * trips * code.loop.special
        runs = work.runs or work.ends
        more = (work.units - runs) * code.behind.instructions if work.units else 0.0
        end_cycles = at_once * warps / issue * (runs * code.outside.instructions + more + work.stores)
    parts["exponentials"] = load * special / SPECIAL_CYCLE * cycle
    power = at["overlap_power"]
    body = sum(part**power for part in parts.values()) ** (1 / power)

    fill = max(l2_s, memory_s if from_memory else 0.0) if work.trips else 0.0
    rounds = work.rounds
    if work.combines:
        rounds += at["atomic_trips"] + (work.gathers or work.parts / LOADS_AT_ONCE)
    # Who comes last reads all parts.
    moved_parts = (work.moved_parts or 1 + work.parts) if work.combines else 0
    own_end = work.ends * work.end_bytes + moved_parts * work.part_bytes
    moved = max(at_once * own_end / at["processor_bytes_cycle"], work.all_end_bytes / waves / at["l2_bytes_cycle"])
    ends = (moved + end_cycles) * cycle
    end = work.ends * rounds * l2_s + ends
    # While one program ends, another beside it is in its body.
    again = (waves - 1) * (fill + end) * (1.0 if at_once == 1 else 0.5)
    if launched.barrier:
        start = at["barrier_trips"] * l2_s
    else:
        start = at["dependent_s"] if launched.dependent and chip.arch >= DEPENDENT_FROM else at["launch_s"]
    around = {"launch": start, "epilogue": ends, "latency": fill + end + again - ends}
    limit = max(parts if body > max(around.values()) else around, key={**parts, **around}.__getitem__)
    spare = max(0.0, start + fill + body + end + again - parts["memory"])
    return Time(start, fill, body, end + again, limit, spare)


def _rate(chip: Chip, code: Code | None, at: Settings) -> float:
    """Operations of a processor's matrix units in a cycle."""
    rate = chip.mma_cycle * at["mma_share"]
    if code is None:
        return rate
    counts = code.loop if code.loop.mma_operations else code.outside
    if not counts.mma_operations:
        return rate
    others = counts.mma_operations - counts.grouped
    return rate * counts.mma_operations / (counts.paid + others / at["sync_share"])


def chain_seconds(chain: Sequence[Launched], chip: Chip, at: Settings) -> list[Time]:
    """Times of launches one after another, with what memory fetches ahead while the kernel ahead has no use for it."""
    found: list[Time] = []
    known: dict[tuple[int, int], Time] = {}
    before: Launched | None = None
    for each in chain:
        key = (id(before), id(each))
        if key not in known:
            known[key] = _after(before, found[-1] if found else None, each, chip, at)
        found.append(known[key])
        before = each
    return found


def _after(before: Launched | None, time: Time | None, each: Launched, chip: Chip, at: Settings) -> Time:
    if each.streamed:
        return launch_time(each, chip, at, 1.0)
    can = each.barrier or (each.dependent and chip.arch >= DEPENDENT_FROM)
    if before is None or time is None or not can or not each.work.ahead_bytes:
        return launch_time(each, chip, at)
    # A barrier's waiting time is all there is; a dependent launch has the rest of the kernel ahead as well, where both
    # fit a processor.
    alone = at["barrier_trips"] * at["l2_cycles"] / at["clock_hz"] if each.barrier else at["dependent_s"]
    beside = 0.0 if each.barrier else share_beside(before, each, chip)
    window = max(0.0, alone + beside * time.spare_s - at["memory_cycles"] / at["clock_hz"])
    ahead = each.work.ahead_bytes / at["memory_bytes_s"]
    return launch_time(each, chip, at, min(1.0, window / ahead))


def stream_share(stages: Sequence[tuple[Launched, Time]], at: Settings) -> tuple[float, str]:
    """How many times as long streamed stages take as by their own times: their weights come at most as fast as memory
    and L2 bring them, all of a launch at once with all else that it does. And which of both limits them, if one does
    more than their own times."""
    alone = sum(time.total_s for _, time in stages)
    if not alone:
        return 1.0, ""
    memory_s = sum(launched.work.memory_bytes for launched, _ in stages) / at["memory_bytes_s"]
    l2_s = sum(launched.work.all_l2_bytes for launched, _ in stages) / at["l2_bytes_cycle"] / at["clock_hz"]
    power, most = at["overlap_power"], max(memory_s, l2_s)
    limit = "" if most < alone else "memory" if memory_s >= l2_s else "L2"
    return float((alone**power + most**power) ** (1 / power) / alone), limit


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """(low, central, high) of a time at a chip's settings: what each figure alone changes, added in quadrature."""
    centre, *others = seconds
    down = math.sqrt(sum(max(0.0, centre - min(pair)) ** 2 for pair in zip(others[::2], others[1::2], strict=True)))
    up = math.sqrt(sum(max(0.0, max(pair) - centre) ** 2 for pair in zip(others[::2], others[1::2], strict=True)))
    return max(0.0, centre - down), centre, centre + up
