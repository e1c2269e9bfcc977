"""Native operators, built from csrc/. Imported by xr0_engine.ops alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

def instruction_sets() -> list[str]:
    """What this processor can run, fastest first: of avx512 (with VNNI), avx2, portable."""

def images_to_patches(
    frames: Sequence[NDArray[np.uint8]],
    sizes: Sequence[tuple[int, int]],
    out: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint16],
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    vertical_first: Sequence[bool] = (),
    bgr: bool = False,
    threads: int = 1,
    instruction_set: str | None = None,
) -> None:
    """Resize frames, normalise them and write them as patches in Qwen's order, without the GIL (spec section 3.1).

    frames: (H, W, 3) uint8 each, any strides, negative ones too; sides of 1 to 32768, aspect ratio at most 200; or
    (temporal_patch_size, H, W, 3), the frames that the patches of a video hold, in the order of time.
    sizes: the (height, width) that each is resized to, in the same limits, multiples of patch_size * merge_size.
    The resize is Pillow's bicubic one, bit for bit: first the columns of all rows, then the rows; the other way round
    for frames whose vertical_first is true. Empty: for none.
    out: (patches of all frames, 3 * temporal_patch_size * patch_size**2) float32, or what float32 is rounded to, to the
    nearest, ties to even: float16, or uint16 for the bits of bfloat16; C-contiguous, writable, not overlapping a frame.
    Filled frame by frame: the patches of one merge block follow each other, each patch is (channel, temporal, row,
    column), a single frame in all of its temporal slices. A temporal_patch_size of 1 gives one frame of a patch, whose
    others are the same.
    bgr: whether the frames' channels are blue, green, red; out's are red, green, blue.
    threads: how many share the work at most, 1 to 1024. instruction_set: one of instruction_sets(), None for the
    fastest. Neither changes a bit of the result.
    Raises ValueError if a dtype, shape, stride, flag or size is not as described, TypeError for other kinds of objects.
    """

def cuda_fault(device: int = 0) -> str | None:
    """Why the CUDA operators cannot use a GPU, None if they can."""

def resize_table(in_size: int, out_size: int) -> NDArray[np.int32]:
    """What images_to_patches_cuda needs of one axis of a resize: (out_size * (1 + taps),), to be copied to the GPU.

    For each output the first of its taps input samples; then, for each output, the samples' weights, times 2**22.
    Raises ValueError for a size that is not in 1..32768.
    """

def images_to_patches_cuda(
    frames: Sequence[tuple[int, tuple[int, int], tuple[int, int, int]]],
    sizes: Sequence[tuple[int, int]],
    columns: Sequence[tuple[int, int]],
    rows: Sequence[tuple[int, int]],
    out: int,
    dtype: str,
    temporal_patch_size: int,
    merge_size: int,
    vertical_first: Sequence[bool],
    slices: Sequence[int],
    bgr: bool,
    device: int,
    stream: int,
) -> None:
    """images_to_patches on a GPU, in one launch; the same bits. Asynchronous. Not yet run on a GPU.

    frames: 1 to 16 of (address, (height, width), strides in bytes), uint8. columns, rows: the address of a resize_table
    on the GPU and its taps, for each frame. slices: -1 for a frame that fills all temporal slices of its patches; 0, 1,
    ... in turn for frames that share patches, each in its own slice. out: address of as many values as
    images_to_patches fills. dtype: float32, bfloat16 or float16. stream: a cudaStream_t. patch_size is 16. All memory
    is the GPU's, and stays as it is until the stream has done the work. Nothing is allocated: the call can be captured
    in a CUDA graph. Raises ValueError if a value, a size or the place of a memory is not as described, RuntimeError
    without a GPU.
    """
