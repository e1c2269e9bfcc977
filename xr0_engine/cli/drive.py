"""`xr0 drive`: a policy executes on a robot, here or over the network, in real or simulated time."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from xr0_engine.cli.seeing import Rerun, check_rerun

if TYPE_CHECKING:
    from xr0_engine.engine import Engine
    from xr0_engine.executor import Report

SHOWN_WARNINGS = 10
"""Of a guard's; all are in the counts, the first hundred in --json."""


def drive(
    env: Annotated[
        str, typer.Option(help="demo: the simulated two-armed robot; null: no robot, to watch the loop alone.")
    ] = "demo",
    server: Annotated[str | None, typer.Option(metavar="URL", help="ws://host:port of an `xr0 serve`.")] = None,
    api_key: Annotated[str | None, typer.Option(help="For a server that asks for one; also from XR0_API_KEY.")] = None,
    ca_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE.pem", help="Certificates to trust, for a wss:// server that signed its own."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Infer on this machine. Without it or a server: scripted motions, no model.")
    ] = None,
    robot_type: Annotated[str | None, typer.Option(help="With env null: which of the policy's robots to be.")] = None,
    embodiment: Annotated[
        str | None,
        typer.Option(help="With a checkpoint: a built-in profile or your own YAML file. Follows from the robot type."),
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Of the robot's images; 320x240, env null 256x256.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="async, guided (trained without prefixes), naive_async (neither) or sync.")
    ] = "async",
    seconds: Annotated[float, typer.Option(min=0.1, help="How long.")] = 10.0,
    delay_steps: Annotated[
        float | None,
        typer.Option(min=0, help="In simulated time: the steps that an inference takes."),
    ] = None,
    trigger: Annotated[
        str, typer.Option(help="Infer when fewer actions than this remain, or `deadline`: as late as the delay allows.")
    ] = "10",
    margin: Annotated[int, typer.Option(min=0, help="Committed actions beyond the delay.")] = 1,
    starvation: Annotated[str, typer.Option(help="When actions run out: hold, decelerate or stop.")] = "hold",
    commands_per_action: Annotated[int, typer.Option(min=1, help="With env null: interpolated commands.")] = 1,
    record: Annotated[Path | None, typer.Option(metavar="FILE", help="For `xr0 replay`; must not exist.")] = None,
    rerun: Rerun = None,
    guard: Annotated[
        str | None,
        typer.Option(metavar="FILE|none", help="Thresholds to warn by; guard.json of the checkpoint if it has one."),
    ] = None,
    guard_stops: Annotated[
        bool, typer.Option("--guard-stops", help="Stop the robot and end at the guard's first warning.")
    ] = False,
    guard_record: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What the guard sees, for xr0 guard calibrate --runs.")
    ] = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention", help="With --rerun, --checkpoint and --delay-steps: also where each chunk's actions look."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Where the cube lies, and the noise of a local policy.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, reference or triton.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Execute a policy's chunks at the control rate while the next ones are inferred, and report how that went.

    In real time, unless --delay-steps is given. `xr0 drive --delay-steps 3 --record run.jsonl`, then `xr0 replay
    run.jsonl`; or `--rerun run.rrd`, then `rerun run.rrd`. Exit code 1: a deadline was missed.
    """
    if env not in ("demo", "null"):
        raise ValueError(f"--env: expected demo or null, got {env!r}")
    if server is not None and checkpoint is not None:
        raise ValueError("--server, --checkpoint: expected at most one of them, got both")
    if mode == "guided" and server is None and checkpoint is None:
        raise ValueError("--mode guided: expected with --checkpoint or --server: the script takes no guide")
    if embodiment is not None and checkpoint is None:
        raise ValueError("--embodiment: expected only with --checkpoint: a server and a script know their own")
    if env == "demo" and (robot_type is not None or commands_per_action != 1):
        raise ValueError("--robot-type, --commands-per-action: expected only with --env null")
    if attention and (rerun is None or checkpoint is None or delay_steps is None or mode == "guided"):
        raise ValueError(
            "--attention: expected with --rerun, --checkpoint and --delay-steps, in another mode than guided: each "
            "chunk is computed a second time, which simulated time hides"
        )
    if trigger != "deadline" and not trigger.isdecimal():
        raise ValueError(f"--trigger: expected a whole number or deadline, got {trigger!r}")

    from xr0_engine import env as env_vars
    from xr0_engine.cli.serve import read_size
    from xr0_engine.drive.guarding import guard_file, guard_of
    from xr0_engine.drive.policies import from_checkpoint, from_server, scripted
    from xr0_engine.drive.run import run
    from xr0_engine.executor import Notes, Recorder, Settings, Several
    from xr0_engine.guard import Guard
    from xr0_engine.guard.recording import RunWriter
    from xr0_engine.sim import ROBOT_TYPE

    thresholds = guard_file(guard, checkpoint)
    if thresholds is None and (guard_stops or guard_record is not None):
        raise ValueError("--guard-stops, --guard-record: expected with --guard FILE, as no checkpoint's folder has one")
    size = None if image_size is None else read_size(image_size)
    check_rerun(rerun)
    wanted = ROBOT_TYPE if env == "demo" else robot_type
    with ExitStack() as stack:
        if server is not None:
            source = stack.enter_context(from_server(server, api_key or env_vars.api_key(), wanted, ca_file))
        elif checkpoint is not None:
            source = from_checkpoint(
                checkpoint, wanted, seed, device, dtype, backend, embodiment, thresholds is not None
            )
        else:
            source = scripted(seed)
        settings = Settings(
            rate_hz=source.control_rate_hz,
            mode=mode,  # type: ignore[arg-type]
            trigger="deadline" if trigger == "deadline" else int(trigger),
            margin=margin,
            max_prefix=source.max_prefix,
            starvation=starvation,  # type: ignore[arg-type]
            commands_per_action=commands_per_action,
        )
        watched = None
        if thresholds is not None:
            if source.info is None:
                raise ValueError("--guard: expected with --checkpoint or --server: the script is no trained policy")
            profile = guard_of(thresholds, source.robot_type, source.info, source.statistics)
            keep = None if guard_record is None else stack.enter_context(RunWriter(guard_record, profile)).keep
            watched = Guard(profile, keep)
        notes: list[Notes] = []
        if record is not None:
            notes.append(stack.enter_context(Recorder(record, source.title)))
        if rerun is not None:
            from xr0_engine.viz import RunView

            view = stack.enter_context(RunView(rerun, source.title, patient=delay_steps is not None))
            notes.append(view)
            if attention:
                from xr0_engine.viz.attention import Attending

                source = replace(source, policy=Attending(cast("Engine", source.policy), view, seed))
        recorder = Several(notes) if notes else None
        report = run(source, settings, seconds, env == "demo", delay_steps, seed, recorder, size, watched, guard_stops)
        # A recording that cannot be finished is told after what was done.
        if as_json:
            print(json.dumps(report.to_json()), flush=True)
        else:
            _show(report)
    raise typer.Exit(1 if report.counts["deadline_misses"] else 0)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    from xr0_engine.executor.report import COUNTS

    table = Table(box=None, pad_edge=False)
    for name in ("count", "", ""):
        table.add_column(name, justify="right" if name else "left")
    for name, count in report.counts.items():
        if count:
            other = "commands that a limit changed" if name.startswith("clipped ") else "warnings of the guard"
            table.add_row(str(count), name, COUNTS.get(name, other))
    console = Console()
    console.print(table)
    for warning in report.warnings[:SHOWN_WARNINGS]:
        passed = f"{warning['value']:.3g}, above {warning['threshold']:.3g}"
        console.print(f"guard, {warning['name']}: {warning['detail']} ({passed})", markup=False, soft_wrap=True)
    for name, times in (("commands after they were due", report.jitter), ("observation to chunk", report.delay)):
        figures = ", ".join(f"p{percent:g} {1e3 * times.percentile_s(percent):.3g}" for percent in (50, 99, 99.9))
        console.print(f"{name}, ms: {figures}, max {1e3 * times.maximum_s:.3g}")
    if report.last_error:
        console.print(f"last error: {report.last_error}", markup=False)
    console.print(f"deadlines missed: {report.counts['deadline_misses']}; ended: {report.ended}")
