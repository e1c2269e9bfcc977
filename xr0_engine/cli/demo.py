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
        typer.Argument(help="Checkpoint with robot type `bimanual`. If not given: a tiny one with random weights."),
    ] = None,
    export: Annotated[
        Path | None, typer.Option(help="Run on a folder of `xr0 export` for case `bimanual` instead of a checkpoint.")
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
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; an export has its own.")] = "bfloat16",
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
    if mode not in (None, "async", "sync"):
        raise ValueError(f"--mode: expected async or sync, got {mode!r}")

    from xr0_engine.engine import Engine
    from xr0_engine.evaluation.aloha import TRANSFER, Aloha
    from xr0_engine.evaluation.benchmark import Trial
    from xr0_engine.evaluation.episode import Execution
    from xr0_engine.evaluation.watched import PANEL, THUMBNAIL_HZ, watch, write_animation
    from xr0_engine.plot import plot_rollout, video_writer
    from xr0_engine.sim import CONTROL_RATE_HZ, ROBOT_TYPE, choose_renderer

    choose_renderer()
    out.mkdir(parents=True, exist_ok=True)
    files = {kind: out / f"rollout.{kind}" for kind in ("png", "mp4", "webp")}
    if export is not None:
        engine = Engine.from_export(export, device, backend)
    else:
        engine = Engine.from_pretrained(checkpoint or _tiny_checkpoint(), device, dtype, backend)
    profile = engine.embodiment(ROBOT_TYPE)
    execute = min(EXECUTE, engine.statistics[ROBOT_TYPE].chunk_length)
    benchmark = Aloha(width, height, execute, horizon_steps=max(1, round(seconds * CONTROL_RATE_HZ)))
    chosen = mode or ("async" if engine.max_prefix else "sync")
    trial = Trial(benchmark.suites()[TRANSFER][0], 0, seed, chosen, delay_steps)  # type: ignore[arg-type]
    execution = Execution(benchmark.rate_hz, execute, seed=seed)
    with video_writer(files["mp4"], PANEL[0] * (1 + len(profile.views)), PANEL[1], round(CONTROL_RATE_HZ)) as write:
        episode, kept = watch(engine, benchmark, trial, execution, instruction, write)
    write_animation(kept.thumbnails, THUMBNAIL_HZ, files["webp"])
    title = f"ALOHA transfer cube, {checkpoint or export or 'random weights'}, {chosen}"
    plot_rollout(kept.observations, kept.chunks, np.stack(kept.states), profile, files["png"], title)
    latency_ms = _percentiles(kept.chunks)
    if as_json:
        facts = {
            "checkpoint": checkpoint if export is None else str(export),
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
    if checkpoint is None and export is None:
        print(RANDOM_WEIGHTS)
    print(f"the cube {'changed hands' if episode.success else 'did not change hands'}: {seconds:.1f} s, mode {chosen}")
    print(f"{files['png']}: frames, chunks and executed motion")
    print(f"{files['mp4']}, {files['webp']}: the robot from outside; in the first also what it sees")


def _tiny_checkpoint() -> Path:
    """The demo's own checkpoint, made when it is first asked for."""
    from xr0_engine.checkpoint import init_checkpoint
    from xr0_engine.env import cache_dir

    folder = cache_dir() / "tiny"
    if not folder.exists():
        init_checkpoint(folder, "tiny")
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
