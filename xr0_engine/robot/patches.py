"""Camera frames to the vision tower's patches: natively, on a GPU, or by Pillow and NumPy; the same bits (spec 3.1).

The only importer of the native module _C.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

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

    images: (H, W, 3) uint8 RGB each, any strides. sizes: the (height, width) to resize each to, multiples of patch *
    merge. out: (all images' patches, 3 * temporal * patch**2) float32 or bfloat16, C-contiguous; filled image by image
    and returned. threads: how many to use at most. On the CPU native where _C was built, Pillow and NumPy on one thread
    otherwise. If out is on a GPU, the images are uploaded at once and processed there, on the current stream; not yet
    run on a GPU. All three give the same bits. Raises ValueError if an image, a size or out is not as described,
    NotImplementedError if out is on a GPU and _C was built without CUDA or patch is not 16.
    """
    if out.device.type not in ("cpu", "cuda") or out.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"out: expected float32 or bfloat16 on cpu or cuda, got {out.dtype} on {out.device}")
    first = [vertical_first(image.shape, size) for image, size in zip(images, sizes, strict=True)]
    if out.device.type == "cuda":
        return _patches_on_gpu(images, sizes, patch, temporal, merge, out, first)
    if native is None:
        array = out.view(torch.uint16).numpy() if out.dtype == torch.bfloat16 else out.numpy()
        _C.images_to_patches(images, sizes, array, patch, temporal, merge, first, threads=threads)
        return out
    rows = _patch_rows(sizes, patch, temporal, out)
    for image, (height, width), target in zip(images, sizes, out.split(rows), strict=True):
        target.copy_(torch.from_numpy(_pillow_patches(image, height, width, patch, temporal, merge)))
    return out


def instruction_sets() -> list[str]:
    """What the native module uses on this CPU, fastest first; empty where it was not built."""
    return _C.instruction_sets() if native is None else []


def native_cuda_fault() -> str | None:
    """Why the native module cannot use a GPU here, None if it can."""
    return native or _C.cuda_fault()


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
    first: list[bool],
) -> torch.Tensor:
    if reason := native or _C.cuda_fault(out.device.index):
        raise NotImplementedError(f"patches on {out.device}: {reason}; make them on the CPU and copy them")
    if patch != 16:
        raise NotImplementedError(f"patch: the GPU's operator has 16 only, got {patch}; the CPU's has any")
    _patch_rows(sizes, patch, temporal, out)
    shapes = [image.shape for image in images]
    pixels = pinned(images).to(out.device, non_blocking=True)
    launch_patches(pixels, shapes, sizes, temporal, merge, out, first)
    return out


def pinned(images: Sequence[np.ndarray]) -> torch.Tensor:
    """Images, (H, W, 3) uint8 of any strides, one behind the other: (bytes,) uint8 that a GPU can copy by itself."""
    offsets = np.cumsum([0, *(image.size for image in images)]).tolist()
    staging = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=True)
    for image, begin, end in zip(images, offsets, offsets[1:], strict=False):
        np.copyto(staging.numpy()[begin:end].reshape(image.shape), image, casting="no")
    return staging


def launch_patches(
    pixels: torch.Tensor,
    shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[tuple[int, int]],
    temporal: int,
    merge: int,
    out: torch.Tensor,
    first: Sequence[bool],
) -> None:
    """images_to_patches of images that are on the GPU, as `pinned` packs them: one launch on the current stream.

    pixels: (bytes,) uint8 on out's device. shapes: (height, width, ...) of each image. first: vertical_first of each.
    The other arguments are those of images_to_patches; patches are of 16. Raises ValueError for memory of another
    device. Not yet run on a GPU.
    """
    offsets = np.cumsum([0, *(3 * shape[0] * shape[1] for shape in shapes)]).tolist()
    columns = [_table(shape[1], size[1], out.device) for shape, size in zip(shapes, sizes, strict=True)]
    rows = [_table(shape[0], size[0], out.device) for shape, size in zip(shapes, sizes, strict=True)]
    _C.images_to_patches_cuda(
        frames=[
            (pixels.data_ptr() + begin, (shape[0], shape[1]), (3 * shape[1], 3, 1))
            for shape, begin in zip(shapes, offsets, strict=False)
        ],
        sizes=sizes,
        columns=[(table.data_ptr(), taps) for table, taps in columns],
        rows=[(table.data_ptr(), taps) for table, taps in rows],
        out=out.data_ptr(),
        bfloat16=out.dtype == torch.bfloat16,
        temporal_patch_size=temporal,
        merge_size=merge,
        vertical_first=first,
        bgr=False,
        device=out.device.index,
        stream=torch.cuda.current_stream(out.device).cuda_stream,
    )


@lru_cache(maxsize=64)
def _table(in_size: int, out_size: int, device: torch.device) -> tuple[torch.Tensor, int]:
    table = torch.from_numpy(_C.resize_table(in_size, out_size)).to(device)
    return table, table.numel() // out_size - 1


def _pillow_patches(image: np.ndarray, height: int, width: int, patch: int, temporal: int, merge: int) -> np.ndarray:
    frame = np.ascontiguousarray(image)
    if frame.shape[:2] != (height, width):
        frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    blocks = PIXEL_VALUES[frame].reshape(
        height // (patch * merge), merge, patch, width // (patch * merge), merge, patch, 3
    )
    # -> block row, block column, row in block, column in block, channel, patch row, patch column
    ordered = blocks.transpose(0, 3, 1, 4, 6, 2, 5)
    repeated = np.repeat(ordered[:, :, :, :, :, None], temporal, axis=5)
    return repeated.reshape(height // patch * (width // patch), -1)


def _pixel_values() -> np.ndarray:
    # The processor's own arithmetic: scaled in float64, rounded, then normalised in float32.
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.float32(0.5)) / np.float32(0.5)


PIXEL_VALUES = _pixel_values()
"""(256,) float32: what each 8-bit channel value becomes."""

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])
"""(major, minor) of the installed Pillow."""
