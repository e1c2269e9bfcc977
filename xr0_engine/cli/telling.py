"""xr0 bench compare, xr0 bench report: what is made of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Result files: A and B, or A, B and A again. With --run-against: options of latency."),
    ] = None,
    threshold: Annotated[str, typer.Option(help="How much slower B may be, beyond noise.")] = "5%",
    series: Annotated[str | None, typer.Option(help="Only this series, such as engine.")] = None,
    run_against: Annotated[
        Path | None, typer.Option(help="Measure A (this other checkout), B (this one) and A again, taking turns.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="With --run-against: processes of each.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the comparison here.")] = None,
) -> None:
    """A regression gate: exit code 1 if B is slower than A past the threshold, beyond the machine's own noise."""
    from xr0_engine.bench.tell import compare as module

    check_file(json_file)
    code = module.run(arguments or [], threshold, series, run_against, repeats, json_file)
    if code:
        raise typer.Exit(code)


def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Result files, written with --json; or folders of `xr0 bench machine`, side by side."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    table: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Instead, write README.md there: its latest results.")
    ] = None,
) -> None:
    """One self-contained HTML page: stages against their bound, histograms, throughput, ablation.

    A roofline of the same case with `--chip here` gives the others their bound. Of folders: one table of their
    machines.
    """
    from xr0_engine.bench.machine import machines
    from xr0_engine.bench.tell import readme
    from xr0_engine.bench.tell import report as module

    if table is not None:
        if files:
            raise ValueError(f"--table: expected no result files beside it, got {len(files)}")
        print(f"wrote {readme.run(table)}")
        return
    check_file(out, "--out")
    folders = [file for file in files or [] if file.is_dir()]
    if folders and len(folders) < len(files or []):
        raise ValueError("results: expected files alone or folders alone, got both")
    if folders:
        machines.run(folders, out)
    else:
        module.run(files or [], out)
    print(f"wrote {out}")


def check_file(file: Path | None, option: str = "--json") -> None:
    """Before minutes of measuring, not after."""
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise ValueError(f"{option}: expected a file in a folder that exists, got {file}")
