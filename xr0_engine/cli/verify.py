"""xr0 verify: golden cases against this machine's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from xr0_engine.comparison import Comparison


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of golden cases. Its .py files are run: use one you trust.")],
    backend: Annotated[str, typer.Option(help="auto, reference or triton.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; each has its own tolerance.")] = "float32",
    way: Annotated[
        str,
        typer.Option(
            help="With triton, how the flow runs: table (as this GPU's table says), chained, layered, persistent, "
            "streamed, overlap or separate (chained, no kernel starting before the one ahead has ended)."
        ),
    ] = "table",
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparisons as JSON instead of a table.")] = False,
) -> None:
    """Check that this machine computes what the model is defined to compute.

    Runs every golden case of a folder through the engine and compares vision tokens, KV block, each flow step, actions
    and training losses with the stored ones. Exit code 0: all within tolerance; 1: at least one is not; 2: no such
    cases.
    """
    from xr0_engine.golden.verify import verify_folder

    report(verify_folder(folder, backend, device, dtype, way), f"{folder}, {dtype}", as_json)


def report(results: Iterable[Comparison], title: str, as_json: bool) -> None:
    """Show comparisons as they come. Exit code 1 if one is out of tolerance."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn
    from rich.table import Table

    comparisons = []
    progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True)
    with progress:
        task = progress.add_task("loading")
        for comparison in results:
            comparisons.append(comparison)
            progress.update(task, description=f"{comparison.case}: {comparison.quantity}")
    failed = [comparison for comparison in comparisons if not comparison.passed]
    if as_json:
        print(json.dumps([asdict(comparison) | {"passed": comparison.passed} for comparison in comparisons], indent=1))
    else:
        table = Table("case", "quantity", "error", "tolerance", "measure", "", title=title)
        for comparison in comparisons:
            verdict = "[green]ok" if comparison.passed else "[bold red]FAIL"
            error, tolerance = f"{comparison.error:.1e}", f"{comparison.tolerance:.1e}"
            table.add_row(comparison.case, comparison.quantity, error, tolerance, comparison.measure, verdict)
        console = Console()
        console.print(table)
        console.print(f"{len(comparisons) - len(failed)} of {len(comparisons)} within tolerance")
    if failed:
        raise typer.Exit(1)
