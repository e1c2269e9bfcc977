"""xr0 bench machine: a machine's first hour."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def machine(
    out: Annotated[Path, typer.Option(metavar="DIR", help="What it leaves; a run that is there is gone on with.")],
    minutes: Annotated[float, typer.Option(help="What does not fit is left out; the next run goes on with it.")] = 25.0,
    golden: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Golden cases; without it, the self-check alone.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="4b, small or tiny; what the GPU and the disk have room for if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cuda:N.")] = "auto",
    only: Annotated[str | None, typer.Option(metavar="PART,...", help="Only these parts, or steps of theirs.")] = None,
    emulate: Annotated[
        int | None,
        typer.Option(metavar="ARCH", help="Without a GPU: 80, 86, 89, 90 or 120, executed on the CPU of a checkout."),
    ] = None,
) -> None:
    """All that is worth knowing of this machine's GPU, in order of worth, each part a process of its own with a limit.

    Parts: machine, correct, sanitizer, tune, latency, tails, ablation, kernels, released, throughput, memory, training,
    loop. A crash or a hang costs its own part; Ctrl-C ends the run, and the same command goes on with it. DIR then
    holds results as JSON, a log of each part and report.html, ready to be sent in. Exit code 1 if something failed.
    """
    from xr0_engine.bench.machine import run
    from xr0_engine.bench.machine.plan import Wish

    parts = () if only is None else tuple(word.strip() for word in only.split(","))
    code = run.machine(Wish(device, size, golden, emulate, parts), minutes, out, lambda line: print(line, flush=True))
    if code:
        raise typer.Exit(code)
