"""`xr0 guard`: thresholds for the live guard of `xr0 serve` and `xr0 drive`, and what it catches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(name="guard", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def _guard() -> None:
    """Calibrate the live guard, which warns where a robot is not as in training, and try it (docs/guard.md)."""


@app.command()
def calibrate(
    datasets: Annotated[list[Path], typer.Argument(help="One robot's: folders, YAML files, package.module:function.")],
    checkpoint: Annotated[
        str | None, typer.Option(help="The policy: its chunks are scored too. Without, the recordings alone.")
    ] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Runs that went well, of xr0 drive --guard-record: a file, or a folder of *.jsonl."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="New or there; guard.json of the checkpoint if not given.")
    ] = None,
    alarms_per_hour: Annotated[
        float, typer.Option(help="False alarms, all checks together, that are put up with; of robots at work.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32: as the policy will run.")] = "bfloat16",
) -> None:
    """Ranges and statistics of recordings, and the thresholds that follow from them."""
    from xr0_engine.files import GUARD_FILE
    from xr0_engine.guard import write_guard
    from xr0_engine.training.guard import calibrate_on

    files = [file for path in runs or () for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if runs and not files:
        raise ValueError(f"--runs: expected runs in {', '.join(map(str, runs))}, got no *.jsonl there")
    if out is None and (checkpoint is None or not Path(checkpoint).is_dir()):
        raise ValueError("--out: expected a file, as no checkpoint's folder is given to put guard.json in")
    engine = None
    if checkpoint is not None:
        from xr0_engine.engine import Engine
        from xr0_engine.model.xr0 import tell_bend

        engine = Engine.from_pretrained(checkpoint, device, dtype, "reference")
        tell_bend(engine.model)
    profile = calibrate_on(datasets, engine, alarms_per_hour, files)
    path = Path(checkpoint or "") / GUARD_FILE if out is None else out
    write_guard(path, profile)
    facts = profile.facts
    print(
        f"{path}: {profile.robot_type}, {facts['episodes']} episodes and {facts['runs']} runs; thresholds of "
        f"{len(profile.thresholds)} scores for {alarms_per_hour:g} false alarms an hour, from {facts['thresholds_of']} "
        f"of them, {facts['hours']:g} h"
    )
    for name, value in profile.thresholds.items():
        print(f"{value:10.4g}  {name}")
