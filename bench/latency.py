"""The engine's latency per stage, against the released way unless told otherwise: one run, the two taking turns.

python -m xr0_engine.bench.latency --size small --robot-type bimanual --threads 1
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from xr0_engine.bench.baseline import ReleasedModel
from xr0_engine.bench.timing import StageTimes, ratio_with_spread, take_turns
from xr0_engine.checkpoint import SIZES, init_checkpoint
from xr0_engine.engine import DTYPES, Engine
from xr0_engine.types import Observation

WARM_UP = 2
GATE = {"float32": 1e-3, "bfloat16": 0.15}
"""Relative RMS between the two before anything is timed; in bfloat16 each rounds in its own places."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder; default: a random one of --size")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--robot-type", default="bimanual", help="decides views and chunk length")
    parser.add_argument("--views", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--dtype", choices=GATE, default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--alone", action="store_true", help="measure the engine only")
    parser.add_argument("--json", action="store_true", help="print every sample as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / options.size
            init_checkpoint(checkpoint, options.size)
        report = measure(checkpoint, options)
    if options.json:
        print(json.dumps(report))
    else:
        _print(report)


def measure(checkpoint: Path, options: argparse.Namespace) -> dict[str, Any]:
    engine = Engine.from_pretrained(checkpoint, device="cpu", dtype=options.dtype)
    observation = engine.example(options.robot_type, tuple(options.views))
    length = engine.statistics[options.robot_type].chunk_length
    noise = torch.randn(1, length, engine.config.head.action_dim, generator=torch.Generator().manual_seed(0))
    rivals: dict[str, Callable[[], StageTimes]] = {
        "engine": lambda: engine.infer(observation, noise=noise.numpy()).timing_ms
    }
    if not options.alone:
        released = _checked_rival(checkpoint, engine, observation, noise, options)
        rivals = {"released": released} | rivals
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=len(rivals) * (options.rounds + WARM_UP))
        samples = take_turns(rivals, options.rounds, WARM_UP, lambda: progress.advance(task))
    return {
        "case": f"{checkpoint.name}, {options.robot_type}, views {options.views[1]}x{options.views[0]}, batch 1",
        "boundary": "infer(), whole call, host preprocessing included",
        "dtype": options.dtype,
        "threads": options.threads,
        "machine": f"{_processor()}, torch {torch.__version__}",
        "milliseconds": {name: {s: v.tolist() for s, v in stages.items()} for name, stages in samples.items()},
    }


def _checked_rival(
    checkpoint: Path, engine: Engine, observation: Observation, noise: Tensor, options: argparse.Namespace
) -> Callable[[], StageTimes]:
    """The released way, after it has given the engine's actions: what computes something else is not compared."""
    head, device = engine.model.head, engine.model.device
    released = ReleasedModel(checkpoint, engine.config, head, device, DTYPES[options.dtype])
    embodiment, statistics = engine.embodiment(options.robot_type), engine.statistics[options.robot_type]
    ours = engine.infer(observation, noise=noise.numpy()).normalized
    theirs, _ = released.infer(observation, embodiment, statistics, noise)
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not error < GATE[options.dtype]:
        raise SystemExit(f"nothing was timed: the two differ by {error:.1e}, more than {GATE[options.dtype]:.0e}")
    return lambda: released.infer(observation, embodiment, statistics, noise)[1]


def _print(report: dict[str, Any]) -> None:
    released, engine = report["milliseconds"].get("released"), report["milliseconds"]["engine"]
    table = Table("stage", "engine p50", "p90", "max", title=report["case"])
    if released:
        for column in ("released p50", "released / engine", "quartiles"):
            table.add_column(column)
    for stage, samples in engine.items():
        row = [f"{value:.1f} ms" for value in (np.median(samples), np.percentile(samples, 90), np.max(samples))]
        if released and stage in released:
            middle, low, high = ratio_with_spread(np.array(released[stage]), np.array(samples))
            row += [f"{np.median(released[stage]):.1f} ms", f"{middle:.2f}", f"{low:.2f} .. {high:.2f}"]
        table.add_row(stage, *row)
    console = Console()
    console.print(table)
    console.print(f"{report['boundary']}; {report['dtype']}, {report['threads']} threads; {report['machine']}")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
