"""xr0 quantize: a checkpoint in 8 bits, compared with itself in 16 before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder in 16 or 32 bits, or a Hugging Face hub id.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist, or be empty.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="int8, fp8, int8-weights, int8-all, fp8-all; or auto: int8, and of it what keeps to the gate. "
            "docs/quantization.md says which for which GPU."
        ),
    ] = "int8",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DATASET", help="Recorded episodes of the same robot, to compare on; as `xr0 train` takes them."
        ),
    ] = None,
    moments: Annotated[int, typer.Option(min=2, help="So many moments of each dataset.")] = 16,
    gate: Annotated[
        Path | None,
        typer.Option(help="JSON file of budgets (docs/quantization.md); where one is missed the exit code is 1."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N: where it is compared.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: what 8 bits are compared with.")] = (
        "bfloat16"
    ),
) -> None:
    """Round a checkpoint's layers to 8 bits, and tell what that changes of its actions.

    `xr0 quantize CHECKPOINT --calibrate EPISODES --out DIR` writes DIR, which loads like any checkpoint, with
    fidelity.json and fidelity.html in it. Without --calibrate nothing is compared, and nothing is promised.

    Exit code 0: written; 1: a budget was missed, nothing is written; 2: it cannot be done, and the message says why.
    """
    datasets = calibrate or []
    if recipe == "auto" and not datasets:
        raise ValueError("--recipe auto: expected --calibrate, recordings on which it can be told what 8 bits change")
    if gate is not None and not datasets:
        raise ValueError("--gate: expected --calibrate beside it: without recordings nothing is compared")

    from rich.console import Console
    from rich.table import Table

    from xr0_engine.quantize.make import make

    report = make(checkpoint, out, recipe, datasets, moments, gate, device, dtype)
    console = Console(highlight=False, soft_wrap=True)
    if report is None:
        console.print(f"wrote {out}; nothing was compared: --calibrate EPISODES does", markup=False)
        return
    table = Table("", "mean", "worst", title=f"{report.source}, {report.recipe}: {report.fidelity.moments} moments")
    for row in report.rows():
        table.add_row(*row)
    console.print(table)
    for layer, why in report.left.items():
        console.print(f"left, {layer}: {why}", markup=False)
    for each in report.missed:
        console.print(f"missed: {each}", markup=False)
    if report.missed:
        console.print("nothing was written; --recipe auto leaves in 16 bits what must stay there", markup=False)
        raise typer.Exit(1)
    before, after = report.bytes_before / 2**20, report.bytes_after / 2**20
    console.print(f"wrote {out}: {after:.1f} MiB of {before:.1f}; the whole comparison is in {out / 'fidelity.html'}")
