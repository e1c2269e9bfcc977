"""`xr0 data`: datasets for the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="data", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

Processes = Annotated[int, typer.Option("--processes", "-j", min=1, help="How many to use at once.")]


@app.callback()
def _data() -> None:
    """Record, check, convert and measure datasets for `xr0 train` (docs/data.md)."""


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="Folder for the episodes; a folder begun before is filled up.")],
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many the folder shall hold.")] = 60,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first try: the cube's place, the start.")] = 0,
    width: Annotated[int, typer.Option(help="Of the frames, in pixels.")] = 160,
    height: Annotated[int, typer.Option(help="Of the frames, in pixels.")] = 120,
    processes: Processes = 1,
) -> None:
    """Roll out a scripted expert in the simulated ALOHA robot; keep the episodes in which it hands the cube over."""
    from xr0_engine.training.data.record import Settings
    from xr0_engine.training.data.record import record as run

    result = run(out, episodes, first_seed, Settings(width, height), processes)
    tries = result.recorded + result.failed
    print(f"{out}: {result.present + result.recorded} episodes, {result.recorded} of them new, from {tries} tries")
