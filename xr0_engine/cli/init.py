"""xr0 init: a random checkpoint in the released layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def init(
    out: Annotated[Path, typer.Option(help="Folder to create; it must be absent or empty.")],
    size: Annotated[
        str, typer.Option(help="tiny (5 MB), small (270 MB) or 4b (8.8 GiB, the published sizes).")
    ] = "tiny",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same weights.")] = 0,
) -> None:
    """Make a complete checkpoint folder with random weights, to try and to measure without a download.

    It has the files, tensor names and tokenizer form of a trained checkpoint, and action statistics for the robot types
    of all built-in embodiments. Its actions are aimless: never send them to a real robot.
    """
    from xr0_engine.checkpoint import init_checkpoint

    init_checkpoint(out, size, seed)
    print(f"wrote a random {size} checkpoint to {out}")
    print(f"next: xr0 inspect {out}")
