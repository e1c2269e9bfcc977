"""Native operators, built from csrc/. Imported by xr0_engine.ops alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def instruction_sets() -> list[str]:
    """What this processor can run, fastest first: of avx512 (with VNNI), avx2, portable."""

def images_to_patches(
    frames: Sequence[NDArray[np.uint8]],
    sizes: Sequence[tuple[int, int]],
    out: NDArray[np.float32] | NDArray[np.uint16],
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    vertical_first: Sequence[bool] = (),
    bgr: bool = False,
    threads: int = 1,
    instruction_set: str | None = None,
) -> None:
    """Resize frames, normalise them and write them as patches in Qwen's order, without the GIL (spec section 3.1).

    frames: (H, W, 3) uint8 each, any strides, negative ones too; sides of 1 to 32768, aspect ratio at most 200.
    sizes: the (height, width) that each is resized to, in the same limits, multiples of patch_size * merge_size.
    The resize is Pillow's bicubic one, bit for bit: first the columns of all rows, then the rows; the other way round
    for frames whose vertical_first is true. Empty: for none.
    out: (patches of all frames, 3 * temporal_patch_size * patch_size**2) float32, or uint16 for the bits of bfloat16;
    C-contiguous, writable, not overlapping a frame. Filled frame by frame: the patches of one merge block follow each
    other, each patch is (channel, temporal, row, column).
    bgr: whether the frames' channels are blue, green, red; out's are red, green, blue.
    threads: how many share the work at most, 1 to 1024. instruction_set: one of instruction_sets(), None for the
    fastest. Neither changes a bit of the result.
    Raises ValueError if a dtype, shape, stride, flag or size is not as described, TypeError for other kinds of objects.
    """
