"""`xr0 bench predict`: what a step takes on a chip that need not be here, by kernel, with a range. Times nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, get_args

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from xr0_engine.backend import triton_installed
from xr0_engine.bench.cases import Setup, describe
from xr0_engine.bench.predict.figures import Chip, find_chip
from xr0_engine.bench.predict.step import Line, predict_case, total_ms
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.step.candidates import name as tactic_name
from xr0_engine.bench.step.recorder import STAGES
from xr0_engine.bench.step.roofline import bounds_ms, operators
from xr0_engine.bench.step.workload import Workload
from xr0_engine.bench.tell.predicted import CELLS, row, stages
from xr0_engine.fused.ops import Flow
from xr0_engine.fused.tactics import TacticTable, read_tactics

MEASURED_HERE = ("device", "processor", "cores", "threads", "driver", "clocks_mhz", "emulated")
"""Of an environment, what a prediction does not depend on."""


def measure(setup: Setup, chip_name: str, flow: str | None, table: Path | None, command: str) -> Result:
    """The prediction of a case, a Result of kind predict.

    flow: of Flow, None for the table's. table: of tactics, None for the stated defaults and the flow as a chain. Raises
    ValueError for what is wrong in them, NotImplementedError without Triton.
    """
    chip = find_chip(chip_name)
    if not triton_installed():
        raise NotImplementedError("predicting compiles kernels and needs Triton: pip install 'xr0-engine[cuda]'")
    known = read_tactics(table) if table is not None else TacticTable("")
    way = flow or known.flow
    if way not in get_args(Flow):
        raise ValueError(f"flow: expected {', '.join(get_args(Flow))}; got {way!r}")
    way = cast(Flow, way)
    lines = _with_progress(lambda done: predict_case(setup, chip, known, way, done), f"compiling for sm_{chip.arch}")
    return _result(setup, chip, way, table, lines, command)


def told_environment(of: str) -> dict[str, Any]:
    """What a prediction depends on beside the code; of a chip, in the place of the machine's name."""
    told = {name: value for name, value in environment("cpu").items() if name not in MEASURED_HERE}
    return {"device": f"{of}, predicted", **told}


def _with_progress(work: Callable[[Callable[[int, int], None]], Any], what: str) -> Any:
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None)

        def done(number: int, of: int) -> None:
            progress.update(task, completed=number, total=of)

        return work(done)


def _result(setup: Setup, chip: Chip, flow: str, table: Path | None, lines: Sequence[Line], command: str) -> Result:
    config, work = Workload.of_case(setup, kept=True)
    ceilings = chip.ceilings
    peak = ceilings.peak(setup.dtype)
    # A prompt's padding is computed as well.
    rows = work.padded_tokens - work.preamble_tokens
    padded = {"prefill": (work.tokens - work.preamble_tokens) / rows}
    launches = []
    for line in lines:
        low, central, high = line.ms
        bound = line.count * max(line.work.useful / peak, line.work.memory_bytes / ceilings.bytes_s)
        launches.append(
            {
                "stage": line.stage,
                "name": line.name,
                "tactic": None if line.tactic is None else tactic_name(line.tactic),
                "launches": line.launches,
                "stages": line.count,
                "combines": line.count * line.work.combines,
                "split_launches": line.count * (line.work.combines > 0),
                "wasted_rows": 1 - (1 - line.work.wasted) * padded.get(line.stage, 1.0),
                "l2_bytes": line.count * line.work.all_l2_bytes,
                "memory_bytes": line.count * line.work.memory_bytes,
                "processors": line.busy,
                "registers": line.code.registers if line.code else None,
                "shared_bytes": line.code.shared if line.code else None,
                "ms": [low, central, high],
                "limit": line.limit,
                "bound_ms": 1e3 * bound,
            }
        )
    return Result(
        kind="predict",
        command=command,
        environment=told_environment(chip.name),
        case=describe(setup, work.tokens, work.chunk_length),
        boundary="stage",
        backend="triton",
        series={},
        facts={
            "predicted": True,
            "chip": chip.name,
            "part": flow,
            "kept_tokens": work.preamble_tokens,
            "table": None if table is None else table.name,
            "ms": {stage or "total": list(total_ms(lines, stage)) for stage in (*STAGES, "")},
            "bound_ms": bounds_ms(operators(config, work, setup.dtype), ceilings),
            "launches": launches,
            "figures": {name: list(figure) for name, figure in asdict(chip.figures).items()},
        },
    )


def show(result: Result, list_kernels: bool = False) -> None:
    """A table of stages, or of every kind of launch."""
    facts, case = result.facts, result.case
    view = Table(box=None, padding=(0, 2, 0, 0))
    view.title = f"{case['name']}, {case['size']}, {case['dtype']}, {facts['chip']}, {facts['part']}: predicted"
    view.add_column("", no_wrap=True)
    for name in CELLS[:-1]:
        view.add_column(name, justify="right", no_wrap=True)
    view.add_column(CELLS[-1], no_wrap=True)
    for stage, together in stages(facts).items():
        for each in facts["launches"] if list_kernels else ():
            if each["stage"] == stage:
                view.add_row(f"  {each['name']}", *row([each], each["ms"], each["bound_ms"]).cells())
        view.add_row(stage, *together.cells())
    console = Console(width=132 if list_kernels else 100)
    console.print(view)
    console.print(
        "A model's figures, nothing measured: docs/benchmarks.md tells how far to trust them. From, to: what each "
        "figure of the chip alone changes, in quadrature.",
        highlight=False,
    )
