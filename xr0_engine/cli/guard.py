"""`xr0 guard`: thresholds for the live guard of `xr0 serve` and `xr0 drive`, and what it catches."""

from __future__ import annotations

import json
import os
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
    from xr0_engine.guard import read_guard, write_guard
    from xr0_engine.guard.calibrate import ENOUGH_RUNS
    from xr0_engine.training.guard import calibrate_on

    files = [file for path in runs or () for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    if runs and not files:
        raise ValueError(f"--runs: expected runs in {', '.join(map(str, runs))}, got no *.jsonl there")
    if out is None and (checkpoint is None or not Path(checkpoint).is_dir()):
        raise ValueError("--out: expected a file, as no checkpoint's folder is given to put guard.json in")
    path = Path(checkpoint or "") / GUARD_FILE if out is None else out
    if path.exists():
        # A file that nothing can be added to is told before the work.
        read_guard(path)
    engine = None
    if checkpoint is not None:
        from xr0_engine.engine import Engine
        from xr0_engine.model.xr0 import tell_bend

        engine = Engine.from_pretrained(checkpoint, device, dtype, "reference")
        tell_bend(engine.model)
    profile = calibrate_on(datasets, engine, alarms_per_hour, files)
    write_guard(path, profile)
    facts = profile.facts
    print(
        f"{path}: {profile.robot_type}, {facts['episodes']} episodes and {facts['runs']} runs; thresholds of "
        f"{len(profile.thresholds)} scores for {alarms_per_hour:g} false alarms an hour, from {facts['thresholds_of']} "
        f"of them, {facts['hours']:g} h"
    )
    for name, value in profile.thresholds.items():
        print(f"{value:10.4g}  {name}")
    if facts["runs"] < ENOUGH_RUNS:
        print(
            f"with fewer than {ENOUGH_RUNS} runs of the policy (--runs) expect more false alarms than that: xr0 drive "
            "--guard-record records them"
        )


@app.command("try")
def try_(
    checkpoint: Annotated[str, typer.Argument(help="A policy of the simulated robot.")],
    guard: Annotated[
        str | None, typer.Option(metavar="FILE", help="Thresholds; guard.json of the checkpoint if not given.")
    ] = None,
    runs: Annotated[int, typer.Option(min=0, help="Of each fault.")] = 5,
    clean: Annotated[int, typer.Option(min=0, help="Runs without a fault.")] = 40,
    fault: Annotated[list[str] | None, typer.Option(help="This one alone; may be repeated. All if not given.")] = None,
    first_seed: Annotated[int, typer.Option(min=0, help="Of the cube's places.")] = 5000,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For the clean runs that went well: calibrate --runs.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The results as JSON.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "float32",
) -> None:
    """Let a policy drive the simulated robot, put faults on to it, and tell what its guard notices."""
    from xr0_engine.drive.faults import FAULTS
    from xr0_engine.drive.guard_trial import results_of, table, try_guard
    from xr0_engine.drive.guarding import guard_file, guard_of
    from xr0_engine.drive.policies import from_checkpoint
    from xr0_engine.sim import ROBOT_TYPE, choose_renderer
    from xr0_engine.training.data.parallel import progress_bar
    from xr0_engine.whole import write_whole

    path = guard_file(guard, checkpoint)
    if path is None:
        raise ValueError(f"--guard: expected a file: {checkpoint} has no guard.json; `xr0 guard calibrate` makes one")
    choose_renderer()
    source = from_checkpoint(checkpoint, ROBOT_TYPE, 0, device, dtype, "reference", tells_bend=True)
    assert source.info is not None
    profile = guard_of(path, source.robot_type, source.info, source.statistics)
    chosen, done = fault or list(FAULTS), []
    with progress_bar() as progress:
        task = progress.add_task("runs", total=runs * len(chosen) + clean)
        for run in try_guard(source, profile, chosen, runs, clean, first_seed, keep):
            done.append(run)
            progress.advance(task)
    results = results_of(done, profile, {"runs": runs, "clean": clean, "renderer": os.environ.get("MUJOCO_GL", "")})
    if out is not None:
        write_whole(out, json.dumps(results, indent=1) + "\n")
    if done:
        print(table(results))


@app.command("table")
def table_(file: Annotated[Path, typer.Argument(help="Results of xr0 guard try --out.")]) -> None:
    """The table of a trial's results, in Markdown."""
    from xr0_engine.drive.guard_trial import read_results, table

    print(table(read_results(file)))
