"""`xr0 demo`: the closed loop of camera frames, inference and motion, in simulation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

if TYPE_CHECKING:
    from xr0_engine.types import ActionChunk

EXECUTE = 10
"""Actions from one inference to the next."""
RANDOM_WEIGHTS = (
    "This checkpoint has random weights, so the arms move aimlessly: the demo shows the path from camera to motion, "
    "not skill."
)


def demo(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Checkpoint with robot type `bimanual`, or XR-1's `mobile`. If not given: the policy that comes along."
        ),
    ] = None,
    family: Annotated[
        str, typer.Option(help="xr1: if no checkpoint is given, a random one of Xiaomi-Robotics-1.")
    ] = "xr0",
    export: Annotated[
        Path | None, typer.Option(help="Run on a folder of `xr0 export` for case `bimanual` or `mobile`.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="How long it may take, in simulated time: up to 60.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Folder for rollout.png, rollout.mp4, rollout.webp.")] = Path(
        "outputs/demo"
    ),
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", "-t", help="What the robot shall do; the simulator's task if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the cube lies, and the noise of every inference.")] = 0,
    mode: Annotated[
        str | None, typer.Option(help="async or sync; async, if not given and the policy was trained with prefixes.")
    ] = None,
    delay_steps: Annotated[
        float, typer.Option(min=0, help="Steps of 1/30 s that the robot moves on while an inference is computed.")
    ] = 2.0,
    width: Annotated[int, typer.Option(help="Of the frames that the model sees: as in its training data.")] = 320,
    height: Annotated[int, typer.Option(help="Of the frames that the model sees: as in its training data.")] = 240,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32; if not given, float32 for what comes along, else bfloat16. An "
            "export has its own."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference or triton; of an export onnx or tensorrt.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome and the files' paths as JSON.")] = False,
) -> None:
    """Drive a simulated two-armed robot (ALOHA, MuJoCo) from its camera images, and film it.

    At 30 Hz, a new inference every ten actions, while the robot moves on (mode async). Time is simulated: the speed of
    this machine changes how long the demo takes, not what it shows. Needs no network.
    """
    if not 0 < seconds <= 60:
        raise ValueError(f"--seconds: expected more than 0, at most 60, got {seconds}")
    if export is not None and checkpoint is not None:
        raise ValueError("--export: expected no checkpoint beside it")
    if family != "xr0" and (export is not None or checkpoint is not None):
        raise ValueError("--family: expected no checkpoint or export beside it, which says its own")
    if mode not in (None, "async", "sync"):
        raise ValueError(f"--mode: expected async or sync, got {mode!r}")

    from xr0_engine.engine import Engine
    from xr0_engine.evaluation.aloha import TRANSFER, Aloha
    from xr0_engine.evaluation.aloha_body import BODIES
    from xr0_engine.evaluation.benchmark import Trial
    from xr0_engine.evaluation.episode import Execution
    from xr0_engine.evaluation.watched import PANEL, THUMBNAIL_HZ, watch, write_animation
    from xr0_engine.plot import plot_rollout, video_writer
    from xr0_engine.sim import CONTROL_RATE_HZ, choose_renderer

    choose_renderer()
    out.mkdir(parents=True, exist_ok=True)
    files = {kind: out / f"rollout.{kind}" for kind in ("png", "mp4", "webp")}
    if export is not None:
        engine = Engine.from_export(export, device, backend)
    elif checkpoint is not None:
        engine = Engine.from_pretrained(checkpoint, device, dtype or "bfloat16", backend)
    else:
        engine = Engine.from_pretrained(_own_checkpoint(family), device, dtype or "float32", backend)
    # The first is told as missing where it has none of them.
    robot_type = next((name for name in BODIES if name in engine.robot_types), next(iter(BODIES)))
    profile = engine.embodiment(robot_type)
    execute = min(EXECUTE, engine.statistics[robot_type].chunk_length)
    benchmark = Aloha(width, height, execute, horizon_steps=max(1, round(seconds * CONTROL_RATE_HZ)))
    chosen = mode or ("async" if engine.max_prefix else "sync")
    trial = Trial(benchmark.suites()[TRANSFER][0], 0, seed, chosen, delay_steps)  # type: ignore[arg-type]
    execution = Execution(benchmark.rate_hz, execute, seed=seed)
    with video_writer(files["mp4"], PANEL[0] * (1 + len(profile.views)), PANEL[1], round(CONTROL_RATE_HZ)) as write:
        episode, kept = watch(engine, benchmark, trial, execution, instruction, write, robot_type)
    write_animation(kept.thumbnails, THUMBNAIL_HZ, files["webp"])
    is_random = checkpoint is None and export is None and family != "xr0"
    named = checkpoint or export or ("random weights" if is_random else "the policy that comes along")
    title = f"ALOHA transfer cube, {named}, {chosen}"
    plot_rollout(kept.observations, kept.chunks, kept.planned, np.stack(kept.states), profile, files["png"], title)
    latency_ms = _percentiles(kept.chunks)
    if as_json:
        facts = {
            "checkpoint": checkpoint if export is None else str(export),
            "robot_type": robot_type,
            "success": episode.success,
            "mode": chosen,
            "delay_steps": delay_steps,
            "frames": episode.steps,
            "inferences": episode.calls,
            "latency_ms": latency_ms,
        }
        print(json.dumps(facts | {kind: str(path) for kind, path in files.items()}))
        return
    _print_latency(latency_ms, episode.calls)
    seconds = episode.steps / CONTROL_RATE_HZ
    if is_random:
        print(RANDOM_WEIGHTS)
    print(f"the cube {'changed hands' if episode.success else 'did not change hands'}: {seconds:.1f} s, mode {chosen}")
    print(f"{files['png']}: frames, chunks and executed motion")
    print(f"{files['mp4']}, {files['webp']}: the robot from outside; in the first also what it sees")


def _own_checkpoint(family: str) -> Path:
    """The trained policy of XR-0; of other families a tiny random checkpoint, made when it is first asked for."""
    from xr0_engine.checkpoint import init_checkpoint
    from xr0_engine.drive.policies import TRAINED
    from xr0_engine.env import cache_dir
    from xr0_engine.sizes import config_of

    if family == "xr0":
        return TRAINED
    config_of(family, "tiny")
    folder = cache_dir() / f"{family}-tiny"
    if not folder.exists():
        init_checkpoint(folder, "tiny", family=family)
    return folder


def _percentiles(chunks: Sequence[ActionChunk]) -> dict[str, dict[str, float]]:
    """Stage -> p50, p90 and max over the inferences, in milliseconds."""
    stages = chunks[0].timing_ms
    times_ms = {stage: [chunk.timing_ms[stage] for chunk in chunks] for stage in stages}
    return {
        stage: {"p50": float(np.percentile(times, 50)), "p90": float(np.percentile(times, 90)), "max": max(times)}
        for stage, times in times_ms.items()
    }


def _print_latency(latency_ms: dict[str, dict[str, float]], inferences: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", title=f"ms per inference ({inferences} inferences)")
    for statistic in ("p50", "p90", "max"):
        table.add_column(statistic, justify="right")
    for stage, times in latency_ms.items():
        table.add_row(stage, *(f"{time_ms:.1f}" for time_ms in times.values()), end_section=stage == "decode")
    Console().print(table)
