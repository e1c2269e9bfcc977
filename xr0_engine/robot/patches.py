"""Camera frames to the vision tower's patches: natively, on a GPU, or by Pillow and NumPy; the same bits (spec 3.1).

The only importer of the native module _C.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import Image

if importlib.util.find_spec("xr0_engine._C") is not None:
    from xr0_engine import _C

    native: str | None = None
else:
    native = "xr0_engine._C was not built: install a C++17 compiler and reinstall xr0-engine from source"


def images_to_patches(
    images: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    patch: int,
    temporal: int,
    merge: int,
    out: torch.Tensor,
    threads: int = 1,
) -> torch.Tensor:
    """Resize images as Pillow does (bicubic), normalise them, and cut them into patches in Qwen's order (spec 3.1).

    images: (H, W, 3) uint8 RGB each, any strides, a picture that fills its patches; or (temporal, H, W, 3), a video's
    frames that share theirs (spec section 8). sizes: the (height, width) to resize each to, multiples of patch *
    merge. out: (all images' patches, 3 * temporal * patch**2) float32, bfloat16 or float16, C-contiguous; filled image
    by image and returned. threads: how many to use at most. On the CPU native where _C was built, Pillow and NumPy on
    one thread otherwise. If out is on a GPU, the images are uploaded at once and processed there, on the current
    stream; not yet run on a GPU. All three give the same bits, those of float32 rounded to the nearest, ties to even.
    Raises ValueError if an image, a size or out is not as described, NotImplementedError if out is on a GPU and _C was
    built without CUDA or patch is not 16.
    """
    if out.device.type not in ("cpu", "cuda") or out.dtype not in DTYPE_NAMES:
        expected = ", ".join(DTYPE_NAMES.values())
        raise ValueError(f"out: expected one of {expected} on cpu or cuda, got {out.dtype} on {out.device}")
    if out.device.type == "cuda":
        return _patches_on_gpu(images, sizes, patch, temporal, merge, out)
    array = _as_array(out)
    if native is None:
        first = [vertical_first(image.shape[-3:], size) for image, size in zip(images, sizes, strict=True)]
        _C.images_to_patches(images, sizes, array, patch, temporal, merge, first, threads=threads)
        return out
    begin, values = 0, _as_array(torch.from_numpy(PIXEL_VALUES).to(out.dtype))
    for image, size, rows in zip(images, sizes, _patch_rows(sizes, patch, temporal, out), strict=True):
        place = array[begin : begin + rows].reshape(rows, 3, temporal, patch, patch)
        if image.ndim == 4 and len(image) != temporal:
            raise ValueError(f"frames: expected {temporal} in a video's patches, got {len(image)}")
        for number, frame in enumerate(image if image.ndim == 4 else image[None]):
            slices = slice(number, number + 1) if image.ndim == 4 else slice(None)
            _pillow_patches(frame, size, patch, merge, values, place[:, :, slices])
        begin += rows
    return out


def instruction_sets() -> list[str]:
    """What the native module uses on this CPU, fastest first; empty where it was not built."""
    return _C.instruction_sets() if native is None else []


def native_cuda_fault(device: int = 0) -> str | None:
    """Why the native module cannot use a GPU here, None if it can."""
    return native or _C.cuda_fault(device)


def made_on(device: torch.device, patch: int) -> torch.device:
    """Where patches for a network on a device are made: on its GPU if the native module can, else on the CPU."""
    if device.type == "cuda" and patch == DEVICE_PATCH and native_cuda_fault(device.index or 0) is None:
        return device
    return torch.device("cpu")


def vertical_first(shape: Sequence[int], size: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes rows before columns, which decides what is rounded in between.

    shape: (height, width, ...) before, size: (height, width) after. Pillow chooses so for tall images: from 13.0 on
    where the height shrinks by more than twice as many pixels as the width, in 12.2 and 12.3 where it is more than 100
    times the width and shrinks, before that never.
    """
    height, width = shape[:2]
    shrinks_by = height - size[0]
    if PILLOW >= (13, 0):
        return shrinks_by > max(0, 2 * (width - size[1]))
    return PILLOW >= (12, 2) and shrinks_by > 0 and height > 100 * width


def _patch_rows(sizes: Sequence[tuple[int, int]], patch: int, temporal: int, out: torch.Tensor) -> list[int]:
    """Patches of each image. Raises ValueError if they do not fill out."""
    rows = [height // patch * (width // patch) for height, width in sizes]
    expected = (sum(rows), 3 * temporal * patch * patch)
    if out.shape != expected or not out.is_contiguous():
        contiguous = "contiguous" if out.is_contiguous() else "not contiguous"
        raise ValueError(f"out: expected contiguous and shape {expected}, got {contiguous} {tuple(out.shape)}")
    return rows


def _patches_on_gpu(
    images: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    patch: int,
    temporal: int,
    merge: int,
    out: torch.Tensor,
) -> torch.Tensor:
    if reason := native_cuda_fault(out.device.index):
        raise NotImplementedError(f"patches on {out.device}: {reason}; make them on the CPU and copy them")
    if patch != DEVICE_PATCH:
        raise NotImplementedError(f"patch: the GPU's operator has {DEVICE_PATCH} only, got {patch}; the CPU's has any")
    _patch_rows(sizes, patch, temporal, out)
    pixels = torch.empty(sum(image.size for image in images), dtype=torch.uint8, pin_memory=True)
    packed = pack(images, pixels)
    launch_patches(pixels.to(out.device, non_blocking=True), packed, sizes, temporal, merge, out)
    return out


class PackedImage(NamedTuple):
    """Where a frame lies. first: byte of its first pixel; shape: (height, width); strides: in bytes, of any sign.
    slice: its temporal slice of the patches that it shares with the frames before and behind it; -1: it fills all."""

    first: int
    shape: tuple[int, int]
    strides: tuple[int, int, int]
    slice: int = -1


def pack(images: Sequence[np.ndarray], out: torch.Tensor) -> list[PackedImage]:
    """Copy images, (H, W, 3) or (temporal, H, W, 3) uint8 of any strides, into out, (bytes,) uint8, one behind the
    other; where each frame lies.

    Axes that run backwards, as those of a turned image do, stay so: a copy in the order of the memory takes a hundredth
    of the time.
    """
    packed, begin = [], 0
    for image, own_slice in _frames(images):
        backwards = [stride < 0 for stride in image.strides]
        in_order = image[tuple(slice(None, None, -1) if axis else slice(None) for axis in backwards)]
        target = out.numpy()[begin : begin + image.size].reshape(image.shape)
        np.copyto(target, in_order, casting="no")
        steps = [-step if axis else step for step, axis in zip(target.strides, backwards, strict=True)]
        first = begin + sum((side - 1) * -min(step, 0) for side, step in zip(image.shape, steps, strict=True))
        packed.append(PackedImage(first, (image.shape[0], image.shape[1]), (steps[0], steps[1], steps[2]), own_slice))
        begin += image.size
    return packed


def launch_patches(
    pixels: torch.Tensor,
    packed: Sequence[PackedImage],
    sizes: Sequence[tuple[int, int]],
    temporal: int,
    merge: int,
    out: torch.Tensor,
) -> None:
    """images_to_patches of images that are on the GPU, on the current stream, in one launch for every LAUNCH_VIEWS.

    pixels: (bytes,) uint8 on out's device. packed: where the images lie there. The other arguments are those of
    images_to_patches; patches are of 16. Raises ValueError for memory of another device. Not yet run on a GPU.
    """
    patches = np.cumsum([0, *_patch_rows(sizes, DEVICE_PATCH, temporal, out)]).tolist()
    starts = [number for number, image in enumerate(packed) if image.slice <= 0]
    # The number of each frame's image.
    owner = np.repeat(np.arange(len(sizes)), np.diff([*starts, len(packed)])).tolist()
    frames = [(image, sizes[own]) for image, own in zip(packed, owner, strict=True)]
    begin = 0
    while begin < len(frames):
        end = min(begin + LAUNCH_VIEWS, len(frames))
        while end < len(frames) and packed[end].slice > 0:
            end -= 1
        part = frames[begin:end]
        columns = [_table(image.shape[1], size[1], out.device) for image, size in part]
        rows = [_table(image.shape[0], size[0], out.device) for image, size in part]
        _C.images_to_patches_cuda(
            frames=[(pixels.data_ptr() + image.first, image.shape, image.strides) for image, _ in part],
            sizes=[size for _, size in part],
            columns=[(table.data_ptr(), taps) for table, taps in columns],
            rows=[(table.data_ptr(), taps) for table, taps in rows],
            out=out[patches[owner[begin]] :].data_ptr(),
            dtype=DTYPE_NAMES[out.dtype],
            temporal_patch_size=temporal,
            merge_size=merge,
            vertical_first=[vertical_first(image.shape, size) for image, size in part],
            slices=[image.slice for image, _ in part],
            bgr=False,
            device=out.device.index,
            stream=torch.cuda.current_stream(out.device).cuda_stream,
        )
        begin = end


def _frames(images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Each frame, (H, W, 3), and its slice, as PackedImage has it."""
    for image in images:
        if image.ndim == 3:
            yield image, -1
        else:
            yield from ((frame, number) for number, frame in enumerate(image))


@lru_cache(maxsize=64)
def _table(in_size: int, out_size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    table = torch.from_numpy(_C.resize_table(in_size, out_size)).to(device)
    return table, table.numel() // out_size - 1


def _as_array(out: torch.Tensor) -> np.ndarray:
    """The tensor's memory; bfloat16, which NumPy lacks, as its bits."""
    return out.view(torch.uint16).numpy() if out.dtype == torch.bfloat16 else out.numpy()


def _pillow_patches(
    image: np.ndarray,
    size: tuple[int, int],
    patch: int,
    merge: int,
    values: np.ndarray,
    out: np.ndarray,
) -> None:
    """values: PIXEL_VALUES in out's dtype. out: (the image's patches, 3, temporal slices to fill, patch, patch)."""
    height, width = size
    frame = np.ascontiguousarray(image)
    if frame.shape[:2] != (height, width):
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    blocks = values[frame].reshape(height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, 3)
    # -> block row, block column, row in block, column in block, channel, patch row, patch column
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    # Only the first axis is divided: still the memory that was given.
    out.reshape(*ordered.shape[:4], *out.shape[1:])[:] = ordered[:, :, :, :, :, None]


def _pixel_values() -> np.ndarray:
    # The processor's own arithmetic: scaled in float64, rounded, then normalised in float32.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


PIXEL_VALUES = _pixel_values()
"""(256,) float32: what each 8-bit channel value becomes."""

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""What patches can be stored as, and its name to the GPU's operator."""

DEVICE_PATCH = 16
"""The patch size of the GPU's operator."""

LAUNCH_VIEWS = 16
"""Images that one launch takes: what they are goes over with the kernel's arguments."""

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
"""(major, minor) of the installed Pillow."""
