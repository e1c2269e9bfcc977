"""Camera frames to the vision tower's patches: this engine against transformers' PIL processor, on one thread.

On a CPU the rivals take turns: `engine`; `processor`, the one that the model was trained with; `pillow`, its resize
alone; `memcpy`, a copy that reads and writes as many bytes as must move at least once. On a GPU only the engine runs,
timed by the device's own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xr0_engine.backend import resolve_device
from xr0_engine.bench.results import Result, environment
from xr0_engine.bench.tell.tables import footer, number
from xr0_engine.bench.timing import CallTimer, ratio_with_spread, run
from xr0_engine.robot import patches
from xr0_engine.robot.preprocess import MAX_PIXELS, MIN_PIXELS, smart_resize

PATCH, TEMPORAL, MERGE = 16, 2, 2
"""The published layout; the model's other sizes make no difference here."""
Size = tuple[int, int]


@dataclass(frozen=True)
class Frames:
    """count frames of one size. image_size: (height, width) as the camera gives them."""

    image_size: Size
    count: int = 1

    @property
    def size(self) -> Size:
        """(height, width) that they are resized to."""
        return smart_resize(*self.image_size, PATCH * MERGE)

    @property
    def name(self) -> str:
        (height, width), (new_height, new_width) = self.image_size, self.size
        frames = f"{self.count} x " if self.count > 1 else ""
        return f"{frames}{width}x{height} to {new_width}x{new_height}"

    @property
    def shape(self) -> tuple[int, int]:
        """Of the patches."""
        return self.count * self.size[0] * self.size[1] // PATCH**2, 3 * TEMPORAL * PATCH**2

    def images(self) -> list[np.ndarray]:
        """(H, W, 3) uint8 each, always the same; noise, since no step depends on what is to be seen."""
        shape = (self.count, *self.image_size, 3)
        return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))

    def least_bytes(self) -> int:
        """Every sample is read once, every float32 of the patches written once; nothing in between is counted."""
        return self.count * 3 * self.image_size[0] * self.image_size[1] + 4 * self.shape[0] * self.shape[1]

    def fill(self, out: Tensor) -> Tensor:
        return patches.images_to_patches(self.images(), [self.size] * self.count, PATCH, TEMPORAL, MERGE, out)


ON_CPU: tuple[Frames, ...] = (Frames((480, 640)), Frames((256, 256)))
ON_GPU: tuple[Frames, ...] = (Frames((480, 640), count=3),)

Calls = Mapping[str, Callable[[], object]]
"""Stage -> what is timed."""


def measure(device: str, rounds: int, command: str) -> tuple[Result, BaseException | None]:
    """The result, and what cut it short, if anything did. The process has one thread from then on.

    device: as resolve_device takes it. Raises ValueError for a wrong argument, NotImplementedError for a GPU that
    the native module cannot use, RuntimeError if the patches differ from the processor's (on a GPU, from the host's) in
    a single bit: nothing is timed then. The GPU path is not yet measured.
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    torch.set_num_threads(1)
    place = resolve_device(device)
    on_gpu = place.type == "cuda"
    frames = ON_GPU if on_gpu else ON_CPU
    rivals = {"engine": _calls_on_gpu(frames, place)} if on_gpu else _rivals(frames)
    timer = CallTimer(place)
    series, reason = run({name: partial(_timed, calls, timer) for name, calls in rivals.items()}, rounds)
    facts: dict[str, Any] = {"least_bytes": {each.name: each.least_bytes() for each in frames}}
    if "memcpy" in series:
        copies = {name: float(np.median(samples)) for name, samples in series["memcpy"].items()}
        facts |= {"chip": "memcpy of as many bytes", "bound_ms": copies}
    result = Result(
        kind="images",
        command=command,
        environment=environment(place),
        case={"name": "frames to patches", "views": [each.image_size for each in frames], "dtype": "float32"},
        boundary="patches",
        backend="cuda" if on_gpu else (patches.instruction_sets() or ["pillow"])[0],
        series=series,
        facts=facts,
        complete=reason is None,
    )
    return result, reason


def _timed(calls: Calls, timer: CallTimer) -> dict[str, float]:
    return {stage: timer(call) for stage, call in calls.items()}


def _rivals(frames: tuple[Frames, ...]) -> dict[str, Calls]:
    # Only the rival needs transformers.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor: Callable[..., Any] = Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    rivals: dict[str, dict[str, Callable[[], object]]] = {"engine": {}, "processor": {}, "pillow": {}, "memcpy": {}}
    for each in frames:
        images, out = each.images(), torch.full(each.shape, torch.nan)
        theirs = partial(processor, images, input_data_format="channels_last", return_tensors="np")
        check(each.name, each.fill(out).numpy(), theirs()["pixel_values"], "the processor's")
        rivals["engine"][each.name] = partial(
            patches.images_to_patches, images, [each.size] * each.count, PATCH, TEMPORAL, MERGE, out
        )
        rivals["processor"][each.name] = theirs
        if each.size != each.image_size:
            whole = Image.fromarray(images[0])
            rivals["pillow"][each.name] = partial(whole.resize, each.size[::-1], Image.Resampling.BICUBIC)
        # It reads half of the bytes and writes the other half.
        source = np.ones(each.least_bytes() // 2, np.uint8)
        rivals["memcpy"][each.name] = partial(np.copyto, np.empty_like(source), source)
    return dict(rivals)


def _calls_on_gpu(frames: tuple[Frames, ...], device: torch.device) -> Calls:
    calls: dict[str, Callable[[], object]] = {}
    for each in frames:
        images, sizes = each.images(), [each.size] * each.count
        shapes = [image.shape for image in images]
        order = [patches.vertical_first(shape, size) for shape, size in zip(shapes, sizes, strict=True)]
        out = torch.full(each.shape, torch.nan, device=device)
        check(each.name, each.fill(out).cpu().numpy(), each.fill(torch.empty(each.shape)).numpy(), "the host's")
        staged = patches.pinned(images)
        pixels = staged.to(device)
        launch = partial(
            patches.launch_patches, shapes=shapes, sizes=sizes, temporal=TEMPORAL, merge=MERGE, out=out, first=order
        )
        calls[f"{each.name}: launch"] = partial(launch, pixels)
        calls[f"{each.name}: upload and launch"] = partial(_upload, staged, device, launch)
    return calls


def _upload(staged: Tensor, device: torch.device, launch: Callable[[Tensor], None]) -> None:
    launch(staged.to(device, non_blocking=True))


def check(name: str, patches: np.ndarray, expected: np.ndarray, whose: str) -> None:
    """Raises RuntimeError if float32 values are not equal, bit for bit."""
    if not np.array_equal(patches.view(np.uint32), expected.view(np.uint32)):
        raise RuntimeError(f"nothing was timed: {name}: the engine's patches are not {whose}")


def show(result: Result) -> None:
    """A table of 80 columns: every rival's time over the engine's, round by round."""
    table = Table(title="frames to patches", box=None)
    table.add_column("frames")
    for column in ("", "ms p50", "over engine's", "quartiles"):
        table.add_column(column, justify="right")
    for stage, samples in result.series["engine"].items():
        table.add_row(stage, "engine", number(float(np.median(samples))), "", "")
        for rival in (rival for rival in result.series if rival != "engine" and stage in result.series[rival]):
            theirs = np.array(result.series[rival][stage])
            middle, low, high = ratio_with_spread(theirs, np.array(samples))
            spread = f"{low:.2f} to {high:.2f}"
            table.add_row("", rival, number(float(np.median(theirs))), f"{middle:.2f}", spread)
    console = Console()
    console.print(table)
    console.print(footer(result), markup=False, highlight=False)
