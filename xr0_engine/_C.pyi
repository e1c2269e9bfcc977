"""Native operators, built from csrc/. Imported by xr0_engine.ops alone."""

import numpy as np
from numpy.typing import NDArray

def frame_to_patches(
    frame: NDArray[np.uint8],
    out: NDArray[np.float32],
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
) -> None:
    """Normalise a resized frame and write it as patches in Qwen's order, without the GIL (spec section 3.1).

    frame: (H, W, 3) uint8 RGB, H and W multiples of patch_size * merge_size; pixels packed, any stride between rows.
    out: (H * W / patch_size**2, 3 * temporal_patch_size * patch_size**2) float32, C-contiguous, writable. Filled:
    the patches of one merge block follow each other, each patch is (channel, temporal, row, column).
    Raises ValueError if a dtype, shape, stride or flag is not as described, or a size is not in 1..1024.
    """
