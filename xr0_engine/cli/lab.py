"""`xr0 lab`: experiments on small tasks, on two CPU cores: what the Λ-mask does (docs/lambda.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="lab", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

Rows = Annotated[Path, typer.Argument(metavar="ROWS", help="A folder of `xr0 lab run`, or a file of `collect`.")]


@app.callback()
def _lab() -> None:
    """Experiments on small tasks: policies from scratch, tried in closed loop and looked into (docs/lambda.md)."""


@app.command()
def run(
    out: Annotated[Path, typer.Argument(help="Folder of the grid: a folder a cell; the same call goes on with it.")],
    plan: Annotated[str, typer.Option(help="quick (ten minutes), committed (docs/lambda.md's), whole.")] = "quick",
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time, one core each.")] = 2,
    known: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Of `collect`: its cells count as done, and come along.")
    ] = None,
    only: Annotated[str | None, typer.Option(metavar="PATTERN", help="Of cells, such as 'two-ways/*/seed-0'.")] = None,
) -> None:
    """Train, try and look into the cells of a plan that are not done yet. Ends with 1 if some failed."""
    from fnmatch import fnmatch

    from rich.console import Console

    from xr0_engine.lab import runner
    from xr0_engine.lab.arms import Plan
    from xr0_engine.lab.plans import find_plan

    chosen = find_plan(plan)
    if only is not None:
        chosen = Plan(tuple(cell for cell in chosen.cells if fnmatch(cell.name, only)), chosen.size)
        if not chosen.cells:
            raise ValueError(f"--only: no cell of plan {plan!r} is called like {only!r}")
    if known is not None:
        runner.restore(known, out)
    failed = runner.run(out, chosen, jobs, Console(stderr=True))
    print(f"{out}: {len(chosen.cells) - len(failed)} of {len(chosen.cells)} cells are done")
    if failed:
        raise typer.Exit(1)


@app.command()
def collect(
    grid: Annotated[Path, typer.Argument(help="A folder of `xr0 lab run`.")],
    out: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="A line a cell.")],
) -> None:
    """Write the rows of a grid into one file."""
    import json

    from xr0_engine.lab.runner import read_rows
    from xr0_engine.whole import write_whole

    rows = read_rows(grid)
    write_whole(out, "".join(json.dumps(row) + "\n" for row in rows))
    print(f"{out}: {len(rows)} cells")


@app.command()
def show(rows: Rows) -> None:
    """The tables: success, reaction, smoothness and sensitivities by arm, differences, and the answer."""
    from xr0_engine.lab.analysis import Table
    from xr0_engine.lab.runner import read_rows
    from xr0_engine.lab.tables import report

    print(report(Table(read_rows(rows))))


@app.command()
def figures(
    rows: Rows,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Of the pictures.")],
    document: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Its tables, between <!-- table NAME --> marks, made anew.")
    ] = None,
) -> None:
    """Draw every figure, and write every table, of docs/lambda.md (extra `plot`)."""
    from xr0_engine.lab.analysis import Table
    from xr0_engine.lab.figures import draw_all
    from xr0_engine.lab.runner import read_rows
    from xr0_engine.lab.tables import write_tables

    table = Table(read_rows(rows))
    for path in draw_all(table, out):
        print(path)
    if document is not None:
        write_tables(table, document)
        print(document)
