"""Watching a run: averages between two reports, JSONL, a progress bar, utilisation, memory.

Shape legend: M rows, T chunk length, A columns.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from xr0_engine.config import ModelConfig
from xr0_engine.files import json_lines, reading, whole
from xr0_engine.training.config import TrainConfig
from xr0_engine.training.distributed import World
from xr0_engine.training.run_folder import METRICS_FILE
from xr0_engine.training.tracking import trackers
from xr0_engine.types import FileError, ModelInputs
from xr0_engine.whole import write_whole

TIME_BINS = 5
"""The loss is reported for this many equal spans of flow time."""
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}
"""Dense bfloat16 of the data sheets, by a part of the device's name; longer names first where one holds another."""


class Averages:
    """Sums over micro-batches, kept on the device until somebody reads them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor, count: Tensor) -> None:
        """value: sums; count: of what was summed; both (K,), or scalars."""
        pair = torch.stack((value.detach().double(), count.detach().double()))
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def add_flow(self, t: Tensor, square_error: Tensor, supervised: Tensor) -> None:
        """Squared error by flow time (TIME_BINS,) and by step of the chunk (T,). t: (M,), the others (M, T, A)."""
        self.add("loss_by_step", square_error.sum((0, 2)), supervised.sum((0, 2)))
        place = (t.to(square_error.device) * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        zeros = torch.zeros(TIME_BINS, device=square_error.device)
        by_time = [zeros.index_add(0, place, part.sum((1, 2))) for part in (square_error, supervised)]
        self.add("loss_by_time", *by_time)

    def take(self, world: World) -> dict[str, Any]:
        """The means over all processes since the last call: floats and lists of floats, None where nothing counted."""
        names = sorted(self._sums)
        if not names:
            return {}
        total = world.sum(torch.cat([self._sums[name].flatten() for name in names]))
        means: dict[str, Any] = {}
        start = 0
        for name in names:
            shape = self._sums[name].shape
            value, count = total[start : start + shape.numel()].view(shape).double()
            start += shape.numel()
            mean = (value / count).tolist()
            means[name] = mean
        self._sums = {}
        return {name: _without_nan(mean) for name, mean in means.items()}


class Log:
    """Where the main process reports to: metrics.jsonl, what else it is watched by (tracking.py) and the terminal."""

    def __init__(self, folder: Path, config: TrainConfig, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        self._forget_after(start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._trackers = trackers(folder, config, start_step)
        self._console = Console()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=300,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=config.optim.steps, completed=start_step)
        self._progress.start()

    def step(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """metrics: floats, or lists of floats (not on the terminal)."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        scalars: dict[str, float] = {}
        for name, value in metrics.items():
            entries = [(name, value)]
            if isinstance(value, list):
                entries = [(f"{name}/{place:02d}", item) for place, item in enumerate(value)]
            scalars |= {entry: item for entry, item in entries if item is not None}
        for tracker in self._trackers:
            tracker.log(step, scalars)
        shown = "  ".join(f"{name} {_short(value)}" for name, value in metrics.items() if isinstance(value, float))
        self._console.print(f"step {step}  {shown}", highlight=False, soft_wrap=True)

    def close(self, failed: bool = False) -> None:
        """failed: the run ends by an error."""
        self._progress.stop()
        for tracker in self._trackers:
            tracker.close(failed)
        self._file.close()

    def _forget_after(self, step: int) -> None:
        """Drop what a killed run reported behind the checkpoint that this one starts from."""
        if not self._path.is_file():
            return
        # From step 0 all is reported anew, what the run starts from included.
        lines = json_lines(self._path, FileError) if step else ()
        kept = [json.dumps(line) for number, line in lines if _step(self._path, number, line) <= step]
        write_whole(self._path, "".join(line + "\n" for line in kept))


def _step(path: Path, number: int, line: Mapping[str, Any]) -> int:
    with reading(f"{path}, line {number}", FileError):
        return whole(line, "step")


class Speed:
    """Rates between two reports."""

    def __init__(self) -> None:
        self._restart()

    def count(self, samples: int, flops: float) -> None:
        """One optimiser step of this process."""
        self._steps += 1
        self._samples += samples
        self._flops += flops

    def take(self, world: World, peak_tflops: float) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        report = {
            "steps_per_s": self._steps / elapsed,
            "samples_per_s": self._samples * world.size / elapsed,
            "tflops": self._flops / elapsed / 1e12,
            "memory_gib": memory_bytes(world.device) / 2**30,
        }
        if peak_tflops:
            report["utilisation"] = report["tflops"] / peak_tflops
        self._restart()
        return report

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What goes on inside takes no time."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    def _restart(self) -> None:
        self._start, self._steps, self._samples, self._flops = time.perf_counter(), 0, 0, 0.0


def memory_bytes(device: torch.device) -> int:
    """The most that this process has held: of the device's memory, on a CPU of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_tflops(device: torch.device) -> float:
    """Of the device in bfloat16, 0 if unknown."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def model_flops(
    config: ModelConfig, inputs: ModelInputs, draws: int, length: int, text_passes: int, vision_passes: int
) -> float:
    """Arithmetic of one micro-batch's training step, padding and recomputation left out: matrix products alone.

    draws: of the DiT per sample, 0 without it. A backward pass takes twice the forward's. text_passes, vision_passes:
    what language model and vision tower take, in forward passes: 3, frozen 1; 2 with adapters, whose layers' weights
    have no gradients.
    """
    text, vision, head = config.text, config.vision, config.head
    rows, tokens = inputs.input_ids.shape
    heads, kv_heads, dim = text.num_heads, text.num_kv_heads, text.head_dim
    weights = text.hidden_size * dim * (2 * heads + 2 * kv_heads) + 3 * text.hidden_size * text.intermediate_size
    # Causal attention does half of the square.
    language = text.num_layers * rows * tokens * (2 * weights + 2 * tokens * heads * dim)
    block = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    tower = 0
    for height, width in inputs.image_grids:
        patches = height * width
        tower += vision.depth * patches * (2 * block + 4 * patches * vision.hidden_size)
    queries = head.context + length
    layer = 4 * head.hidden_size**2 + 3 * head.hidden_size * head.intermediate_size
    dit = head.num_layers * draws * rows * queries * (2 * layer + 4 * (tokens + queries) * head.hidden_size)
    return float(text_passes * language + vision_passes * tower + 3 * dit)


def _without_nan(mean: Any) -> Any:
    """None in the place of what JSON has no number for."""
    if isinstance(mean, list):
        return [_without_nan(value) for value in mean]
    return mean if mean is None or math.isfinite(mean) else None


def _short(value: float) -> str:
    return f"{value:.4g}"
