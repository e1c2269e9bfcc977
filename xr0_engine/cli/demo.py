"""`xr0 demo`: the closed loop of camera frames, inference and motion, in simulation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

if TYPE_CHECKING:
    from xr0_engine.types import ActionChunk, Observation

REPLAN_EVERY = 10
VIDEO_VIEW_SIZE = (480, 360)
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
    seconds: Annotated[float, typer.Option(help="How long the robot moves, in simulated time: up to 60.")] = 4.0,
    out: Annotated[Path, typer.Option(help="Folder for rollout.png and rollout.mp4.")] = Path("outputs/demo"),
    instruction: Annotated[
        str | None,
        typer.Option("--instruction", "-t", help="What the robot shall do; the simulator's task if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Where the cube lies, and the noise of every inference.")] = 0,
    width: Annotated[int, typer.Option(help="Of the frames that the model sees: as in its training data.")] = 640,
    height: Annotated[int, typer.Option(help="Of the frames that the model sees: as in its training data.")] = 480,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; an export has its own.")] = "bfloat16",
    backend: Annotated[str, typer.Option(help="auto, reference or triton; of an export onnx or tensorrt.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the latencies and the files' paths as JSON.")] = False,
) -> None:
    """Drive a simulated two-armed robot (ALOHA, MuJoCo) from its camera images, and film it.

    Ten actions of each chunk are executed at 30 Hz, then the robot looks again. The simulation waits while the model
    computes, so the speed of this machine changes how long the demo takes, not what it shows. Needs no network.
    """
    if not 0 < seconds <= 60:
        raise ValueError(f"--seconds: expected more than 0, at most 60, got {seconds}")
    if export is not None and checkpoint is not None:
        raise ValueError("--export: expected no checkpoint beside it")

    from rich.console import Console
    from rich.progress import track

    from xr0_engine.engine import Engine
    from xr0_engine.plot import plot_rollout, video_writer
    from xr0_engine.sim import CONTROL_RATE_HZ, INSTRUCTION, ROBOT_TYPE, AlohaEnv

    instruction = INSTRUCTION if instruction is None else instruction
    out.mkdir(parents=True, exist_ok=True)
    png, mp4 = out / "rollout.png", out / "rollout.mp4"
    progress = Console(stderr=True)
    observations: list[Observation] = []
    chunks: list[ActionChunk] = []
    states: list[np.ndarray] = []
    with AlohaEnv(seed, width, height) as env:
        if export is not None:
            engine = Engine.from_export(export, device, backend)
        else:
            engine = Engine.from_pretrained(checkpoint or _tiny_checkpoint(), device, dtype, backend)
        profile = engine.embodiment(ROBOT_TYPE)
        replan_every = min(REPLAN_EVERY, engine.statistics[ROBOT_TYPE].chunk_length)
        engine.warm_up([env.observe(instruction)])
        width, height = VIDEO_VIEW_SIZE
        with video_writer(mp4, width * len(profile.views), height, round(CONTROL_RATE_HZ)) as write:
            for tick in track(range(max(1, round(seconds * CONTROL_RATE_HZ))), "driving", console=progress):
                observation = env.observe(instruction)
                write(_side_by_side(observation))
                states.append(observation.state[0])
                if tick % replan_every == 0:
                    observations.append(observation)
                    chunks.append(engine.infer(observation, seed=seed + tick))
                env.apply(chunks[-1].actions[tick % replan_every], observations[-1])
    name = checkpoint or export or "random weights"
    plot_rollout(observations, chunks, np.stack(states), profile, png, f"ALOHA transfer cube, {name}: {instruction}")
    latency_ms = _percentiles(chunks)
    if as_json:
        facts = {
            "checkpoint": checkpoint if export is None else str(export),
            "frames": len(states),
            "inferences": len(chunks),
            "latency_ms": latency_ms,
        }
        print(json.dumps(facts | {"png": str(png), "mp4": str(mp4)}))
        return
    _print_latency(latency_ms, len(chunks))
    if checkpoint is None and export is None:
        print(RANDOM_WEIGHTS)
    print(
        f"{png}: frames, chunks and executed motion\n{mp4}: {len(states)} frames, {len(states) / CONTROL_RATE_HZ:.1f} s"
    )


def _tiny_checkpoint() -> Path:
    """The demo's own checkpoint, made when it is first asked for."""
    from xr0_engine.checkpoint import init_checkpoint
    from xr0_engine.env import cache_dir

    folder = cache_dir() / "tiny"
    if not folder.exists():
        init_checkpoint(folder, "tiny")
    return folder


def _side_by_side(observation: Observation) -> np.ndarray:
    from PIL import Image

    views = (Image.fromarray(np.ascontiguousarray(image)) for image in observation.images.values())
    return np.concatenate([np.asarray(view.resize(VIDEO_VIEW_SIZE)) for view in views], axis=1)


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
