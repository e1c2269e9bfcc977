"""What a kernel is compiled to, read from its machine code: resources, and instructions in its main loop and around it.

The main loop is the innermost one with the most operations of matrix units. What is counted is kept by the code's hash.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from xr0_engine.env import cache_dir
from xr0_engine.files import FAULTS, read_json
from xr0_engine.fused.paper import compile_launch
from xr0_engine.whole import write_whole

if TYPE_CHECKING:
    from xr0_engine.fused.paper import Launch

FULL_COLUMNS = 64
"""From so many columns on wgmma reaches its rate (figures.py: dissecting)."""
WARPS_OF_A_GROUP = 4
"""Warps that issue one wgmma together."""
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
MMA_SHAPE = re.compile(r"\.(\d+)x(\d+)x(\d+)")
ARRIVAL, WAIT = re.compile(r"REDG?\.E\.ADD.*STRONG\.GPU"), re.compile(r"LDG?\.E.*STRONG\.GPU")
"""At a barrier of the grid: who counts up, and who looks."""
INVALIDATES_WITHIN = 3
"""So many instructions behind such a look, what the processor has in its cache is no longer valid."""
SYNC_SHAPES = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32, "1684": 16 * 8 * 4}
SHARED_BYTES = {"LDSM": 512, "STSM": 512, "LDS": 128, "STS": 128, "LDGSTS": 128}
"""Of a warp's instruction that names no width: LDSM's matrices are counted as four."""
VERSION = 7
"""Of what is kept."""


@dataclass(frozen=True)
class Counts:
    """Of one warp. instructions: issued; mma_operations: a multiplication and an addition are two; grouped: those of
    wgmma, its share of the group's; paid: the same, as many as take as long at FULL_COLUMNS. shared_bytes: moved
    between registers and shared memory, or into it; special: of the unit for exponentials and roots."""

    instructions: int = 0
    mma_operations: float = 0.0
    grouped: float = 0.0
    paid: float = 0.0
    shared_bytes: int = 0
    special: int = 0


@dataclass(frozen=True)
class Code:
    """Bytes of shared memory and spilled, registers per thread; loop, outside: of the main loop once, and of the rest,
    every instruction as if it ran once; behind: of that, what stands in loops of its own. stages: both of each stage of
    a kernel that waits for its grid, from the wait to the arrival; what is done between an arrival and the next wait is
    hidden by it."""

    name: str
    shared: int
    registers: int
    spills: int
    warps: int
    loop: Counts = field(default_factory=Counts)
    outside: Counts = field(default_factory=Counts)
    behind: Counts = field(default_factory=Counts)
    stages: tuple[tuple[Counts, Counts], ...] = ()

    def of_stage(self, number: int) -> Code:
        """The code of one stage alone, on a program of this kernel."""
        loop, outside = self.stages[number]
        return replace(self, loop=loop, outside=outside, behind=Counts(), stages=())


def compiled_code(call: Launch, arch: int) -> Code:
    """Raises what compile_launch raises for what cannot be compiled."""
    binary = compile_launch(call, arch)
    path = cache_dir() / "predict" / f"{hashlib.sha256(binary.cubin).hexdigest()[:32]}.json"
    # A damaged note is none: the code is read again.
    with suppress(OSError, KeyError, *FAULTS):
        content = read_json(path)
        if content.pop("version") == VERSION:
            stages = tuple((Counts(**loop), Counts(**outside)) for loop, outside in content.pop("stages"))
            return Code(
                **content
                | {name: Counts(**content[name]) for name in ("loop", "outside", "behind")}
                | {"stages": stages}
            )
    report = _read(binary.cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, f"cuobjdump's report was not understood: {report[:1000]}"
    resources = call.name, binary.shared, int(found[1]), int(found[2]), binary.warps
    code = Code(*resources, *count(report), behind(report), stages_of(report))
    write_whole(path, json.dumps({"version": VERSION, **asdict(code)}) + "\n")
    return code


def _read(cubin: bytes) -> str:
    """Resources and listing, by the cuobjdump that comes with Triton."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


Instruction = tuple[int, str, str]
"""Address, name with its options, the rest."""


def _instructions(listing: str) -> list[Instruction]:
    return [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(listing)]


def count(listing: str) -> tuple[Counts, Counts]:
    """Of the main loop and of the rest, from what `cuobjdump -sass` writes of one kernel."""
    return _split(_instructions(listing))


def behind(listing: str) -> Counts:
    """As count, of what stands in loops that have nothing of the main one."""
    found = _instructions(listing)
    loops, main = _loops(found)
    apart = [loop for loop in loops if main is None or loop[1] < main[0] or main[1] < loop[0]]
    return _count(each for each in found if any(first <= each[0] <= last for first, last in apart))


def stages_of(listing: str) -> tuple[tuple[Counts, Counts], ...]:
    """As count, of each run of instructions from the first wait for the grid behind an arrival to the next arrival."""
    found = _instructions(listing)
    stages, begin, arrived = [], None, False
    for number, (_, name, _) in enumerate(found):
        following = [name for _, name, _ in found[number + 1 : number + 1 + INVALIDATES_WITHIN]]
        if ARRIVAL.match(name):
            if begin is not None:
                stages.append(_split(found[begin:number]))
            begin, arrived = None, True
        elif arrived and begin is None and WAIT.match(name) and "CCTL.IVALL" in following:
            begin = number
    if begin is not None:
        stages.append(_split(found[begin:]))
    return tuple(stages)


def _loops(found: list[Instruction]) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """(first, last) address of all loops, and of the main one, if there is one."""
    loops = []
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and found[0][0] <= int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    inside = {loop: [each for each in found if loop[0] <= each[0] <= loop[1]] for loop in loops}
    innermost = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    main = max(innermost, key=lambda loop: _count(inside[loop]).mma_operations, default=None)
    return loops, None if main is None or _count(inside[main]).mma_operations == 0 else main


def _split(found: list[Instruction]) -> tuple[Counts, Counts]:
    _, main = _loops(found)
    if main is None:
        return Counts(), _count(found)
    inside = (each for each in found if main[0] <= each[0] <= main[1])
    return _count(inside), _count(each for each in found if not main[0] <= each[0] <= main[1])


def _count(found: Iterable[Instruction]) -> Counts:
    instructions = special = shared = 0
    operations = grouped = paid = 0.0
    for _, name, _ in found:
        head, _, options = name.partition(".")
        if head in ("NOP", "EXIT") or (head == "BRA" and not options):
            continue
        instructions += 1
        special += head == "MUFU"
        if head in SHARED_BYTES:
            wide = 4 if "128" in options and head != "LDSM" else 2 if "64" in options else 1
            shared += SHARED_BYTES[head] * wide
        if head.endswith("GMMA") and (shape := MMA_SHAPE.search(name)):
            rows, columns, depth = map(int, shape.groups())
            share = 2 * rows * columns * depth / WARPS_OF_A_GROUP
            operations, grouped = operations + share, grouped + share
            paid += share * max(1.0, FULL_COLUMNS / columns)
        elif head in ("HMMA", "IMMA", "QMMA"):
            operations += 2 * SYNC_SHAPES.get(options.split(".")[0], 0)
    return Counts(instructions, operations, grouped, paid, shared, special)
