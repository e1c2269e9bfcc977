"""xr0 init: a random checkpoint in the released layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    out: Annotated[Path, typer.Option(help="Folder to create; it must be absent or empty.")],
    family: Annotated[str, typer.Option(help="xr0 (Xiaomi-Robotics-0) or xr1 (Xiaomi-Robotics-1).")] = "xr0",
    size: Annotated[
        str,
        typer.Option(
            help="tiny (5 MB), small (270 MB, xr0 alone), or the published sizes: 4b (8.8 GiB) of xr0, 5b (9.5 GiB) of "
            "xr1."
        ),
    ] = "tiny",
    config: Annotated[
        Path | None,
        typer.Option(help="JSON with keys of config.json: other sizes; what it leaves out is as in --size."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same weights.")] = 0,
) -> None:
    """Make a complete checkpoint folder with random weights, to try, to measure and to train without a download.

    It has the files, tensor names and tokenizer form of a trained checkpoint, and action statistics for the robot types
    of all built-in embodiments, or of the one that --config names. Its actions are aimless: never send them to a real
    robot.
    """
    from xr0_engine.checkpoint import init_checkpoint

    init_checkpoint(out, size, seed, config, family)
    print(f"wrote a random {config or (size if family == 'xr0' else f'{family} {size}')} checkpoint to {out}")
    print(f"next: xr0 inspect {out}")
