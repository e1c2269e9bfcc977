"""From the start of a process to its first action, weights on disk: fresh processes, one after the other.

Run as a module, this file is that process; so it imports what is heavy in its functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xr0_engine.bench.cases import Setup
    from xr0_engine.bench.results import Result

STAGES = {
    "start": "Python itself",
    "import": "torch and the engine",
    "load": "checkpoint to device",
    "first infer": "with all set-up that a first call pays for",
    "total": "process start to first action",
    "second infer": "for comparison",
}
READ_BYTES = 16 * 2**20


def measure(setup: Setup, rounds: int, evict: bool, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. setup.case is one of CASES.

    evict: ask the kernel to drop the weights from the page cache before each process; else they are read just before.
    Raises ValueError for a wrong argument, RuntimeError if a process fails or its first and second actions differ.
    """
    from xr0_engine.bench.results import Result, environment
    from xr0_engine.bench.timing import run

    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    device = setup.prepare()
    weights = sorted(setup.folder().glob("*.safetensors"))
    told: dict[str, Any] = {}

    def once() -> dict[str, float]:
        for file in weights:
            (_drop if evict else _read)(file)
        told.update(_fresh_process(setup))
        return told["times_ms"]

    series, reason = run({"engine": once}, rounds, warm_up=0)
    result = Result(
        kind="coldstart",
        command=command,
        environment=environment(device),
        case=told["case"],
        boundary="process",
        backend=told["backend"],
        series=series,
        facts={
            "weights_cached": not evict,
            "page_cache": "the kernel was asked to drop the weights" if evict else "the weights were read just before",
            "weights_bytes": sum(file.stat().st_size for file in weights),
        },
        complete=reason is None,
    )
    return result, reason


def _fresh_process(setup: Setup) -> dict[str, Any]:
    options = {name: value for name, value in vars(setup).items() if name != "case"} | {"case": setup.case.name}
    # The monotonic clock is the same in all processes.
    command = [sys.executable, "-m", "xr0_engine.bench.measure.coldstart", json.dumps(options), repr(time.monotonic())]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        last = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"the process that was measured ended with {run.returncode}: {last}")
    return json.loads(run.stdout.splitlines()[-1])


def _infer_twice(options: dict[str, Any], begin: float) -> dict[str, Any]:
    """In the fresh process. begin: when it was started, on the monotonic clock."""
    marks = [begin, time.monotonic()]
    from xr0_engine.bench.cases import Setup, Subject, find_case

    setup = Setup(**(options | {"case": find_case(options["case"])}))
    marks.append(time.monotonic())
    subject = Subject.load(setup)
    marks.append(time.monotonic())
    first = subject.infer()
    marks.append(time.monotonic())
    second = subject.infer()
    marks.append(time.monotonic())

    import numpy as np

    if not np.allclose(first[0].normalized, second[0].normalized, rtol=0, atol=0.05):
        raise RuntimeError("the first call gave other actions than the second")
    spans = [1e3 * (end - start) for start, end in pairwise(marks)]
    times = dict(zip(("start", "import", "load", "first infer", "second infer"), spans, strict=True))
    times["total"] = sum(spans[:4])
    return {
        "times_ms": {stage: times[stage] for stage in STAGES},
        "case": subject.describe(),
        "backend": subject.engine.backend,
    }


def _read(file: Path) -> None:
    """Into the page cache, as far as memory allows."""
    with file.open("rb", buffering=0) as handle:
        buffer = bytearray(READ_BYTES)
        while handle.readinto(buffer):
            pass


def _drop(file: Path) -> None:
    """Out of the page cache. Only what is safely on disk can be dropped, and the kernel may decline."""
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def show(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    from xr0_engine.bench.results import summary
    from xr0_engine.bench.tell.tables import footer, precision

    case = result.case
    table = Table(title=f"{case['name']}, {case['size']}, {precision(case)}: a fresh process, seconds", box=None)
    for column in ("stage", "what"):
        table.add_column(column)
    for column in ("p50", "max"):
        table.add_column(column, justify="right")
    for stage, samples in result.series["engine"].items():
        found = summary(samples)
        p50, longest = found["p50"], found["max"]
        assert p50 is not None
        assert longest is not None
        table.add_row(stage, STAGES[stage], f"{p50 / 1000:.2f}", f"{longest / 1000:.2f}")
    console = Console()
    console.print(table)
    console.print(f"{result.facts['weights_bytes'] / 2**30:.2f} GiB of weights; {result.facts['page_cache']}")
    console.print(footer(result), markup=False, highlight=False)


if __name__ == "__main__":
    print(json.dumps(_infer_twice(json.loads(sys.argv[1]), float(sys.argv[2]))))
