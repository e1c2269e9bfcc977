"""The C++ machine: built on first use, kept by its sources, called through the structures of cpp/abi.h."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tests.ptx.decoder import Program
from tests.ptx.settings import ASYNCHRONOUS, CHECKS, Settings, cache_folder

SOURCES = Path(__file__).parent / "cpp"
# Sums are rounded as the chip rounds them: neither contracted nor reordered.
FLAGS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-math-errno", "-fPIC")
STATUSES = ("finished", "fault", "budget", "deadlock")


class _Grid(ctypes.Structure):
    _fields_ = (
        ("program", ctypes.c_void_p),
        ("blocks", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("warps", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_char_p),
        ("parameter_bytes", ctypes.c_uint64),
        ("early", ctypes.c_uint32),
        ("cooperative", ctypes.c_uint32),
    )


class _Range(ctypes.Structure):
    _fields_ = (("low", ctypes.c_uint64), ("high", ctypes.c_uint64))


class _Settings(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("check", "race", "asynchronous", "resident")),
        *((name, ctypes.c_uint64) for name in ("seed", "quantum", "budget")),
    )


class _Totals(ctypes.Structure):
    _fields_ = (("executed", ctypes.c_uint64), ("matrix_products", ctypes.c_uint64))


class _Report(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("grid", ctypes.c_int32),
        ("other_grid", ctypes.c_int32),
        ("line", ctypes.c_uint32),
        ("other_line", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
        ("count", ctypes.c_uint64),
        ("text", ctypes.c_char * 232),
    )


@dataclass(frozen=True)
class Grid:
    """One launch of a loaded program. blocks, cluster: x, y, z. parameters: as ld.param addresses them. early,
    cooperative: as struct Grid of cpp/abi.h."""

    program: LoadedProgram
    blocks: tuple[int, int, int]
    cluster: tuple[int, int, int]
    warps: int
    shared_bytes: int
    parameters: bytes
    early: bool = False
    cooperative: bool = False


@dataclass(frozen=True)
class Report:
    """As struct Report of cpp/abi.h. lines, grids: of the access that came second, and of the one before it, 0 and -1
    where there is none."""

    kind: str
    lines: tuple[int, int]
    grids: tuple[int, int]
    count: int
    text: str


@dataclass(frozen=True)
class Outcome:
    """status: one of STATUSES; executed: instructions of warps; matrix_products: of 16 x 8 x k."""

    status: str
    executed: int
    matrix_products: int
    reports: list[Report]


class LoadedProgram:
    """A program in the machine. Raises NotImplementedError if it has an op that the machine has not."""

    def __init__(self, program: Program) -> None:
        self.program, self._library = program, library()
        numbers = [self._library.machine_op(name.encode()) for name in program.ops]
        if missing := [name for name, number in zip(program.ops, numbers, strict=True) if number < 0]:
            raise NotImplementedError(f"{program.name}: the machine has no {', '.join(missing)}")
        records = program.records.copy()
        records["op"] = [numbers[op] for op in records["op"]]
        constants = program.constants
        self.handle = self._library.program_new(
            records.ctypes.data, len(records), program.pool.ctypes.data, len(program.pool), program.register_bytes,
            constants.ctypes.data, len(constants),
        )  # fmt: skip

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._library.program_free(self.handle)


def run(grids: Sequence[Grid], ranges: Sequence[tuple[int, int]], settings: Settings) -> Outcome:
    """Grids one behind the other as one stream. ranges: [low, high) of memory that they may touch, none overlapping."""
    machine, own = library(), [_own(grid) for grid in grids]
    check, race = CHECKS[settings.check]
    given = _Settings(
        check, race, ASYNCHRONOUS[settings.asynchronous], settings.resident, settings.seed, settings.quantum,
        settings.budget,
    )  # fmt: skip
    totals, handle = _Totals(), machine.machine_new()
    try:
        status = machine.machine_run(
            handle, (_Grid * len(own))(*own), len(own), (_Range * len(ranges))(*ranges), len(ranges),
            ctypes.byref(given), ctypes.byref(totals),
        )  # fmt: skip
        found = ctypes.cast(machine.machine_reports(handle), ctypes.POINTER(_Report))
        reports = [_report(machine, found[index]) for index in range(machine.machine_report_count(handle))]
    finally:
        machine.machine_free(handle)
    return Outcome(STATUSES[status], totals.executed, totals.matrix_products, reports)


def _own(grid: Grid) -> _Grid:
    return _Grid(
        grid.program.handle, grid.blocks, grid.cluster, grid.warps, grid.shared_bytes, grid.parameters,
        len(grid.parameters), grid.early, grid.cooperative,
    )  # fmt: skip


def _report(machine: ctypes.CDLL, report: _Report) -> Report:
    kind = machine.machine_kind_name(report.kind).decode()
    lines, grids = (report.line, report.other_line), (report.grid, report.other_grid)
    return Report(kind, lines, grids, report.count, report.text.decode())


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """Raises RuntimeError where there is no C++ compiler, or it fails."""
    loaded = ctypes.CDLL(str(build()))
    number, pointer = ctypes.c_int32, ctypes.c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "machine_op": (number, [ctypes.c_char_p]),
        "program_new": (pointer, [pointer, number, pointer, number, ctypes.c_uint32, pointer, number]),
        "program_free": (None, [pointer]),
        "machine_new": (pointer, []),
        "machine_free": (None, [pointer]),
        "machine_run": (number, [pointer, pointer, number, pointer, number, pointer, pointer]),
        "machine_report_count": (number, [pointer]),
        "machine_reports": (pointer, [pointer]),
        "machine_kind_name": (ctypes.c_char_p, [number]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def build() -> Path:
    """The shared library for these sources, this compiler and this processor."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the emulator is compiled on first use, and there is no C++ compiler: install g++")
    sources = sorted(SOURCES.glob("*.cpp"))
    digest = hashlib.sha256(_native(compiler))
    for path in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(path.name.encode() + path.read_bytes())
    target = cache_folder() / f"machine-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            objects = [Path(folder) / f"{path.stem}.o" for path in sources]
            list(pool.map(lambda source, out: _compile(compiler, "-c", source, "-o", out), sources, objects))
        linked = Path(folder) / target.name
        _compile(compiler, "-shared", "-Wl,-z,defs", *objects, "-o", linked)
        # Another process may be doing the same: whoever comes last replaces what is equal.
        linked.replace(target)
    return target


def _compile(compiler: str, *arguments: object) -> None:
    done = subprocess.run([compiler, *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulator's machine does not compile:\n{done.stderr[-4000:]}")


def _native(compiler: str) -> bytes:
    """What the compiler makes of -march=native here, its version and the other flags."""
    told = subprocess.run([compiler, *FLAGS, "-E", "-v", "-x", "c++", os.devnull], capture_output=True, check=True)
    return told.stderr
