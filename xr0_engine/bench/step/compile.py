"""Every kernel of a step, compiled for a chip that need not be here: what each takes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from xr0_engine.backend import resolve_dtype, triton_installed
from xr0_engine.bench.cases import Setup
from xr0_engine.bench.step.roofline import Workload
from xr0_engine.config import XR0Config
from xr0_engine.fused.head import FusedHead
from xr0_engine.fused.ops import SHARED_LIMIT, FlowInputs, FusedOps, compile_kernels
from xr0_engine.fused.prompts import PROMPT_BUCKET
from xr0_engine.fused.vlm import FusedText, FusedVision
from xr0_engine.model.layers import pack_linears
from xr0_engine.model.xr0 import XR0Model

if TYPE_CHECKING:
    from xr0_engine.fused.ops import Compiled

TILES = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K", "SPLITS")
"""Compile-time sizes worth telling."""


def compile_step(
    config: XR0Config, work: Workload, dtype: str, arch: int, done: Callable[[int, int], None]
) -> list[Compiled]:
    """All variants that one whole step launches with default tactics. Weights and inputs have shapes alone.

    Raises ValueError for an unknown dtype or chip, NotImplementedError without Triton.
    """
    precision = resolve_dtype(dtype)
    if arch not in SHARED_LIMIT:
        raise ValueError(f"arch: expected one of {', '.join(map(str, SHARED_LIMIT))}; got {arch}")
    if not triton_installed():
        raise NotImplementedError("compiling needs Triton: pip install 'xr0-engine[cuda]'")
    meta = torch.device("meta")
    with meta:
        model = XR0Model(config).to(precision).eval().requires_grad_(False)
    pack_linears(model)
    ops = FusedOps("triton", meta, arch=arch)
    return compile_kernels(lambda: _step(model, ops, work), arch, done)


def _step(model: XR0Model, ops: FusedOps, work: Workload) -> None:
    config, dtype, batch = model.config, model.dtype, work.batch
    vision = FusedVision(model.vlm.model.visual)
    text, head = FusedText(model.vlm.model.language_model), FusedHead(model.head)
    tokens = -(-work.tokens // PROMPT_BUCKET) * PROMPT_BUCKET

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    images = vision.buffers(work.grids)
    vision.run(ops, empty(sum(h * w for h, w in work.grids), config.vision.patch_dim), images)
    prompt, own = text.buffers(batch, tokens, work.preamble_tokens), (batch, tokens - work.preamble_tokens)
    ids, index, positions = (empty(*shape, dtype=torch.int32) for shape in (own, own, (3, *own)))
    text.run(ops, ids, positions, index, images.tokens[0], tuple(tap[0] for tap in images.deepstack), prompt)
    chunk = (batch, work.chunk_length, config.head.action_dim)
    rows = empty(batch, dtype=torch.int32)
    first = config.text.num_layers - config.head.num_layers
    inputs = FlowInputs(
        keys=prompt.keys[first:],
        values=prompt.values[first:],
        begin=rows,
        end=rows,
        next_position=empty(3, batch, dtype=torch.int32),
        state=empty(batch, config.head.state_length, config.head.state_dim),
        noise=empty(*chunk, dtype=torch.float32),
        prefix=empty(*chunk, dtype=torch.float32),
        prefix_length=rows,
        action_mask=empty(*chunk, dtype=torch.float32),
    )
    head.run(ops, inputs, head.buffers(batch, work.chunk_length))


def run(setup: Setup, arch: int, as_json: bool) -> bool:
    """`xr0 bench compile`. Prints what each kernel takes; whether all fit. Raises as compile_step."""
    config, work = Workload.of_case(setup)
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
