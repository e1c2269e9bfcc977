"""Every kernel of a step, compiled for a chip that need not be here: what each takes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from xr0_engine.backend import resolve_dtype, triton_installed
from xr0_engine.bench.cases import Setup
from xr0_engine.bench.step.recorder import META, parts_on_meta, step_on_meta
from xr0_engine.bench.step.workload import Workload
from xr0_engine.config import ModelConfig
from xr0_engine.fused.ops import SHARED_LIMIT, FusedOps
from xr0_engine.fused.paper import compile_kernels

if TYPE_CHECKING:
    from xr0_engine.fused.paper import Compiled

TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "SPLITS")
"""Compile-time sizes worth telling."""


def compile_step(
    config: ModelConfig, work: Workload, dtype: str, arch: int, done: Callable[[int, int], None]
) -> list[Compiled]:
    """All variants that one whole step launches with default tactics. Weights and inputs have shapes alone.

    Raises ValueError for an unknown dtype or chip, NotImplementedError without Triton.
    """
    precision = resolve_dtype(dtype)
    if arch not in SHARED_LIMIT:
        raise ValueError(f"arch: expected one of {', '.join(map(str, SHARED_LIMIT))}; got {arch}")
    if not triton_installed():
        raise NotImplementedError("compiling needs Triton: pip install 'xr0-engine[cuda]'")
    parts, ops = parts_on_meta(config, precision), FusedOps("triton", META, arch=arch)
    columns = config.vision.frame_dim
    return compile_kernels(lambda: step_on_meta(parts, work, ops, work.padded_tokens, columns), arch, done)


def run(setup: Setup, arch: int, as_json: bool) -> bool:
    """`xr0 bench compile`. Prints what each kernel takes; whether all fit. Raises as compile_step."""
    config, work = Workload.of_case(setup, kept=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"compiling for sm_{arch}", total=None)

        def done(number: int, total: int) -> None:
            progress.update(task, completed=number, total=total)

        compiled = compile_step(config, work, setup.dtype, arch, done)
    wrong = faults(compiled, arch)
    if as_json:
        print(json.dumps({"arch": arch, "kernels": [asdict(kernel) for kernel in compiled], "faults": wrong}))
    else:
        Console().print(show(compiled, arch))
    if wrong:
        Console(stderr=True).print("\n".join(wrong), markup=False)
    return not wrong


def faults(compiled: list[Compiled], arch: int) -> list[str]:
    """What does not fit the chip, in words: too much shared memory, registers spilled."""
    found = [f"{k.name}: {k.shared} bytes of shared memory" for k in compiled if k.shared > SHARED_LIMIT[arch]]
    return found + [f"{k.name}: {k.spills} bytes spilled" for k in compiled if k.spills]


def show(compiled: list[Compiled], arch: int) -> Table:
    view = Table(
        "kernel", "tile", *("threads", "registers", "spilled bytes", "shared KiB"),
        title=f"kernels on sm_{arch}: {SHARED_LIMIT[arch] // 1024} KiB of shared memory for a block",
    )  # fmt: skip
    for kernel in compiled:
        tiles = (f"{name.lower()} {kernel.constexprs[name]}" for name in TILES if name in kernel.constexprs)
        numbers = (kernel.threads, kernel.registers, kernel.spills, f"{kernel.shared / 1024:.1f}")
        view.add_row(kernel.name.strip("_"), ", ".join(tiles), *map(str, numbers))
    return view
