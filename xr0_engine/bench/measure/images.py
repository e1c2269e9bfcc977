"""Camera frames to the vision tower's patches: this engine against transformers' PIL processor, on one thread.

On a CPU the rivals take turns: `engine`, in float32; `processor`, the one that the model was trained with; `pillow`,
its resize alone; `memcpy`, a copy that reads and writes as many bytes as must move at least once; `bfloat16`, what the
GPU backend asks of the engine: 16 bits, one frame of each temporal patch; `converted`, `engine` and then torch's
rounding to 16 bits.

On a GPU the patches are in bfloat16, of one frame. The launch, and the upload with it, are timed by the device's own
clock; by the wall clock, from frames on the host to patches on the GPU, `engine` makes them there, `host` here.
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
SHORT = torch.bfloat16
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
    def sizes(self) -> list[Size]:
        return [self.size] * self.count

    @property
    def shape(self) -> tuple[int, int]:
        """Of the patches, each with every frame of its temporal patch."""
        return self.count * self.size[0] * self.size[1] // PATCH**2, 3 * TEMPORAL * PATCH**2

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Of the patches with one frame."""
        return self.shape[0], self.shape[1] // TEMPORAL

    def images(self) -> list[np.ndarray]:
        """(H, W, 3) uint8 each, always the same; noise, since no step depends on what is to be seen."""
        shape = (self.count, *self.image_size, 3)
        return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))

    def least_bytes(self) -> int:
        """Every sample is read once, every float32 of the patches written once; nothing in between is counted."""
        return self.count * 3 * self.image_size[0] * self.image_size[1] + 4 * self.shape[0] * self.shape[1]

    def fill(self, out: Tensor, images: list[np.ndarray] | None = None) -> Tensor:
        """out: of shape or frame_shape, as images_to_patches takes it. images: None makes them."""
        frames = out.shape[1] // (3 * PATCH**2)
        given = self.images() if images is None else images
        return patches.images_to_patches(given, self.sizes, PATCH, frames, MERGE, out)


ON_CPU: tuple[Frames, ...] = (Frames((480, 640)), Frames((256, 256)))
ON_GPU: tuple[Frames, ...] = (Frames((480, 640), count=3),)

Calls = Mapping[str, Callable[[], object]]
"""Stage -> what is timed."""
Rival = Callable[[], dict[str, float]]
"""Stage -> milliseconds."""


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
    dtype = "bfloat16" if on_gpu else "float32"
    frames = ON_GPU if on_gpu else ON_CPU
    rivals = _rivals_on_gpu(frames, place) if on_gpu else _rivals(frames)
    series, reason = run(rivals, rounds)
    facts: dict[str, Any] = {}
    if "memcpy" in series:
        least = {each.name: each.least_bytes() for each in frames}
        copies = {name: float(np.median(samples)) for name, samples in series["memcpy"].items()}
        facts = {"least_bytes": least, "chip": "memcpy of as many bytes", "bound_ms": copies}
    result = Result(
        kind="images",
        command=command,
        environment=environment(place),
        case={"name": "frames to patches", "views": [each.image_size for each in frames], "dtype": dtype},
        boundary="patches",
        backend="cuda" if on_gpu else (patches.instruction_sets() or ["pillow"])[0],
        series=series,
        facts=facts,
        complete=reason is None,
    )
    return result, reason


def _timed(calls: Calls, timer: CallTimer) -> dict[str, float]:
    return {stage: timer(call) for stage, call in calls.items()}


def _rivals(frames: tuple[Frames, ...]) -> Mapping[str, Rival]:
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
    names = ("engine", "processor", "pillow", "memcpy", "bfloat16", "converted")
    rivals: dict[str, dict[str, Callable[[], object]]] = {name: {} for name in names}
    for each in frames:
        images, out = each.images(), torch.full(each.shape, torch.nan)
        short, converted = (torch.full(shape, torch.nan, dtype=SHORT) for shape in (each.frame_shape, each.shape))
        theirs = partial(processor, images, input_data_format="channels_last", return_tensors="np")
        check(each.name, each.fill(out).numpy(), theirs()["pixel_values"], "the processor's")
        check(each.name, bits(each.fill(short)), bits(_first_frame(out).to(SHORT)), "the rounded float32's")
        rivals["engine"][each.name] = partial(each.fill, out, images)
        rivals["bfloat16"][each.name] = partial(each.fill, short, images)
        rivals["converted"][each.name] = partial(_converted, each, images, out, converted)
        rivals["processor"][each.name] = theirs
        if each.size != each.image_size:
            whole = Image.fromarray(images[0])
            rivals["pillow"][each.name] = partial(whole.resize, each.size[::-1], Image.Resampling.BICUBIC)
        # It reads half of the bytes and writes the other half.
        source = np.ones(each.least_bytes() // 2, np.uint8)
        rivals["memcpy"][each.name] = partial(np.copyto, np.empty_like(source), source)
    timer = CallTimer(torch.device("cpu"))
    return {name: partial(_timed, calls, timer) for name, calls in rivals.items()}


def _rivals_on_gpu(frames: tuple[Frames, ...], device: torch.device) -> Mapping[str, Rival]:
    by_device: dict[str, Callable[[], object]] = {}
    there: dict[str, Callable[[], object]] = {}
    here: dict[str, Callable[[], object]] = {}
    for each in frames:
        images = each.images()
        out = torch.full(each.frame_shape, torch.nan, dtype=SHORT, device=device)
        check(each.name, bits(each.fill(out)), bits(each.fill(torch.empty_like(out, device="cpu"))), "the host's")
        staged = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=True)
        packed, pixels = patches.pack(images, staged), staged.to(device)
        launch = partial(patches.launch_patches, packed=packed, sizes=each.sizes, temporal=1, merge=MERGE, out=out)
        by_device[f"{each.name}: launch"] = partial(launch, pixels)
        by_device[f"{each.name}: upload and launch"] = partial(_upload, staged, device, launch)
        there[f"{each.name}: from frames"] = partial(_made_there, each, images, out)
        here[f"{each.name}: from frames"] = partial(_made_here, each, images, out)
    own, wall = CallTimer(device), CallTimer(torch.device("cpu"))
    return {
        "engine": lambda: _timed(by_device, own) | _timed(there, wall),
        "host": partial(_timed, here, wall),
    }


def _converted(frames: Frames, images: list[np.ndarray], out: Tensor, short: Tensor) -> None:
    short.copy_(frames.fill(out, images))


def _upload(staged: Tensor, device: torch.device, launch: Callable[[Tensor], None]) -> None:
    launch(staged.to(device, non_blocking=True))


def _made_there(frames: Frames, images: list[np.ndarray], out: Tensor) -> None:
    frames.fill(out, images)
    torch.cuda.synchronize(out.device)


def _made_here(frames: Frames, images: list[np.ndarray], out: Tensor) -> None:
    out.copy_(frames.fill(torch.empty_like(out, device="cpu", pin_memory=True), images), non_blocking=True)
    torch.cuda.synchronize(out.device)


def _first_frame(whole: Tensor) -> Tensor:
    return whole.unflatten(1, (3, TEMPORAL, PATCH**2))[:, :, 0].flatten(1)


def bits(values: Tensor) -> np.ndarray:
    return values.cpu().view(torch.uint8).numpy()


def check(name: str, patches: np.ndarray, expected: np.ndarray, whose: str) -> None:
    """Raises RuntimeError if the values are not equal, bit for bit."""
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
