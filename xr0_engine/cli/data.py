"""`xr0 data`: datasets for the trainer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from xr0_engine.cli.seeing import Rerun, check_rerun

app = typer.Typer(name="data", no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")

Processes = Annotated[int, typer.Option("--processes", "-j", min=1, help="How many to use at once.")]


@app.callback()
def _data() -> None:
    """Record, check, look at, convert and measure datasets for `xr0 train` (docs/data.md)."""


@app.command()
def record(
    out: Annotated[Path, typer.Argument(help="Folder for the episodes; a folder begun before is filled up.")],
    episodes: Annotated[int, typer.Option("--episodes", "-n", min=1, help="How many the folder shall hold.")] = 60,
    first_seed: Annotated[int, typer.Option(min=0, help="Seed of the first try: the cube's place, the start.")] = 0,
    width: Annotated[int, typer.Option(help="Of the frames, in pixels.")] = 160,
    height: Annotated[int, typer.Option(help="Of the frames, in pixels.")] = 120,
    over_table: Annotated[
        float, typer.Option(help="Share of the episodes that begin with the right gripper somewhere over the table.")
    ] = 0.0,
    midway: Annotated[
        float, typer.Option(help="Share of the episodes that begin somewhere on the way, the arms a little astray.")
    ] = 0.0,
    policy: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="What leads those of --midway astray; chance if not given.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Keep so much of each episode, from its start.")] = None,
    antialias: Annotated[bool, typer.Option(help="Smooth edges; without, a CPU renders twice as fast.")] = True,
    view: Annotated[
        list[str] | None, typer.Option(help="Record this one; give it more than once. All if not given.")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Roll out a scripted expert in the simulated ALOHA robot; keep the episodes in which it hands the cube over."""
    from xr0_engine.training.data.record import Settings
    from xr0_engine.training.data.record import record as run

    settings = Settings(
        width, height, over_table=over_table, midway=midway, policy=policy, seconds=seconds, antialias=antialias
    )
    if view:
        settings = replace(settings, views=tuple(view))
    result = run(out, episodes, first_seed, settings, processes)
    tries = result.recorded + result.failed
    print(f"{out}: {result.present + result.recorded} episodes, {result.recorded} of them new, from {tries} tries")


@app.command()
def check(
    datasets: Annotated[
        list[Path], typer.Argument(help="Folders, YAML files, hub ids, package.module:function, .jsonl.")
    ],
    fast: Annotated[bool, typer.Option("--fast", help="Only the first and last frame of each view.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    processes: Processes = 1,
) -> None:
    """Decode every frame that training could ask for; list what it would stop at or take wrongly. Exit code 1 if any.

    Pictures of datasets of one robot type are compared with each other: give all that one run trains on.
    """
    from xr0_engine.training.data.check import Checker, report

    checker = Checker(fast, processes)
    result = report([(path, checker.check(path)) for path in datasets])
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        for dataset in result["datasets"]:
            for fault in (fault for finding in dataset["findings"] for fault in finding["faults"]):
                print(fault)
            print(dataset["verdict"])
    if not result["usable"]:
        raise typer.Exit(1)


@app.command()
def view(
    dataset: Annotated[Path, typer.Argument(help="Folder, YAML file or package.module:function.")],
    rerun: Rerun = None,
    episodes: Annotated[
        str | None, typer.Option(metavar="0-4,7", help="Which, of those that can be read; the first ten if not given.")
    ] = None,
    processes: Processes = 1,
) -> None:
    """Show a dataset in rerun: its episodes with pictures, states and actions; statistics; what `check --fast` finds.

    `xr0 data view DATASET` writes view.rrd into this folder, which `rerun view.rrd` opens (extra `viz`).
    """
    target = rerun or "view.rrd"
    check_rerun(target)

    from xr0_engine.viz.dataset import read_numbers, show_dataset

    shown = show_dataset(dataset, target, None if episodes is None else read_numbers(episodes), processes)
    print(f"{target}: {shown.episodes} of {shown.readable} episodes, {shown.faults} faults in all")


@app.command()
def stats(
    datasets: Annotated[
        list[Path], typer.Argument(help="One robot's: folders, YAML files, hub ids, package.module:function.")
    ],
    out: Annotated[Path, typer.Option(help="preprocessor_config.json, new or of a checkpoint: others' stay in it.")],
    chunk_length: Annotated[int, typer.Option(min=1, help="Actions in a chunk, T.")] = 30,
    validation_fraction: Annotated[float, typer.Option(help="Of the episodes, held out; as in training.")] = 0.1,
    replace: Annotated[bool, typer.Option("--replace", help="Replace statistics of this robot type.")] = False,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out episodes that cannot be read.")] = False,
    quantiles: Annotated[
        bool, typer.Option("--quantiles", help="q01 and q99 too; XR-1 normalises states by them.")
    ] = False,
    processes: Processes = 1,
) -> None:
    """Mean and std of the actions, per timestep and column, over all training windows."""
    from xr0_engine.training.data.stats import compute, merge

    statistics = compute(datasets, chunk_length, validation_fraction, processes, skip_broken, quantiles)
    merge(out, statistics, replace)
    print(
        f"{out}: {statistics.robot_type}, {chunk_length} steps, "
        f"{statistics.windows} windows of {statistics.episodes} episodes"
        + ("" if statistics.active_columns is None else f", {len(statistics.active_columns)} active columns")
    )


@app.command()
def convert(
    dataset: Annotated[
        Path, typer.Argument(help="Folder of episodes or LeRobot dataset, its YAML description, or a hub id.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Episode files to a LeRobot v3.0 dataset, or a LeRobot dataset (v2.0 to v3.0) to episode files."""
    from xr0_engine.training.data.convert import from_lerobot, to_lerobot
    from xr0_engine.training.data.lerobot import LeRobotDataset
    from xr0_engine.training.data.sources import open_source

    source = open_source(dataset)
    (from_lerobot if isinstance(source, LeRobotDataset) else to_lerobot)(source, out)
    print(f"{out}: {len(source.names)} episodes")
