"""xr0 bench seams: how chunks meet, in simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xr0_engine.cli.telling import check_file

if TYPE_CHECKING:
    from xr0_engine.drive.policies import Source


def seams(
    checkpoint: Annotated[
        str | None, typer.Option(help="With robot type `bimanual`. Without it: scripted motions, no model.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the picture goes.")] = Path("seams.png"),
    seconds: Annotated[float, typer.Option(min=5, help="Simulated seconds of each run.")] = 20.0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each mode and delay.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
) -> None:
    """How far apart chunks are where they meet: async against naive_async in the simulation, delays of 1 to 6 steps.

    Simulated time: the result is that of the policy and the executor, not of this machine's speed.
    """
    from xr0_engine.drive.policies import from_checkpoint, scripted
    from xr0_engine.drive.seams import compare, plot, table
    from xr0_engine.sim import ROBOT_TYPE

    check_file(out, "--out")

    def source(seed: int) -> Source:
        if checkpoint is None:
            return scripted(seed)
        return from_checkpoint(checkpoint, ROBOT_TYPE, seed, device, dtype, "auto")

    comparison = compare(source, range(1, 7), seconds, range(seeds))
    plot(comparison, out)
    print(f"{comparison.title}; steps in mrad\n\n{table(comparison)}\n\nwrote {out}")
