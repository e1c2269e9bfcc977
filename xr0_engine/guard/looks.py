"""A camera's frame in a few hundred numbers: what a guard keeps and compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

GRID = 8
"""Cells of a thumbnail, each way: enough to tell which way up a scene is, too few to tell where a cube lies."""
CELL_PIXELS = 8
"""Pixels of a cell that are looked at, each way."""
SAMPLE_PIXELS = 128
"""Pixels of a whole frame that are compared with the frame before, each way, at most: an arm that moves crosses some of
them."""
DARK = 4.0
"""Levels of contrast below which a picture is noise: it is not spread to fill the scale."""

TURNS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "turned by 180 degrees": lambda cells: cells[::-1, ::-1],
    "upside down in a mirror": lambda cells: cells[::-1],
    "mirrored left to right": lambda cells: cells[:, ::-1],
    "red and blue exchanged": lambda cells: cells[..., ::-1],
}
"""What happens to cameras -> the same done to a thumbnail. Each undoes itself."""


@dataclass(frozen=True, eq=False)
class Look:
    """A frame as the policy sees it. brightness, contrast: mean and std of its cells, levels of 0 to 255. thumbnail:
    (GRID, GRID, 3) float32, less its mean and over its std. change: how far its pixels are from those of the frame
    before in the mean, levels; 0 exactly where it is the same picture, None for the first frame. aspect: width over
    height of the camera's frame; None where it came prepared."""

    brightness: float
    contrast: float
    thumbnail: np.ndarray
    change: float | None
    aspect: float | None = None


class Eye:
    """Looks at one view's frames in turn. rotate_180, center_crop: what the policy's profile does to a raw frame."""

    def __init__(self, rotate_180: bool, center_crop: float) -> None:
        self._rotate_180, self._center_crop = rotate_180, center_crop
        self._before: np.ndarray | None = None

    def look(self, frame: np.ndarray, prepared: bool = False) -> Look:
        """frame: (H, W, 3) uint8, any strides; not kept. prepared: it is turned and cropped already."""
        whole = picked(frame, SAMPLE_PIXELS)
        change = None
        if self._before is not None and self._before.shape == whole.shape:
            # The distance of bytes, in bytes.
            apart = np.maximum(whole, self._before) - np.minimum(whole, self._before)
            change = float(apart.mean(dtype=np.float64))
        self._before = whole
        aspect = None if prepared else frame.shape[1] / frame.shape[0]
        part = frame if prepared else cropped(frame, self._center_crop)
        cells = thumbnail(part)
        if self._rotate_180 and not prepared:
            cells = cells[::-1, ::-1]
        brightness, contrast = float(cells.mean()), float(cells.std())
        return Look(brightness, contrast, (cells - brightness) / max(contrast, DARK), change, aspect)


def is_frame(image: np.ndarray) -> bool:
    """Whether it can be looked at: (H, W, 3) uint8, of at least a pixel."""
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size > 0


def cropped(frame: np.ndarray, fraction: float) -> np.ndarray:
    """The middle of a frame, this fraction of each side: a view of it."""
    if fraction >= 1:
        return frame
    height, width = (max(1, int(side * fraction)) for side in frame.shape[:2])
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    return frame[top : top + height, left : left + width]


def picked(frame: np.ndarray, most: int) -> np.ndarray:
    """A copy of up to most x most of its pixels, evenly spread."""
    down, right = (-(-side // most) for side in frame.shape[:2])
    return frame[::down, ::right].copy()


def thumbnail(frame: np.ndarray) -> np.ndarray:
    """(GRID, GRID, 3) float32, levels: means of evenly spread pixels of each cell; the aspect is not kept."""
    side = GRID * CELL_PIXELS
    rows, columns = (np.arange(side) * size // side for size in frame.shape[:2])
    # Rows first: sums over whole lines of numbers are several times quicker than over pixels.
    pixels = frame.take(rows, axis=0).take(columns, axis=1).reshape(GRID, CELL_PIXELS, side * 3)
    lines = pixels.sum(axis=1, dtype=np.float32).reshape(GRID, GRID, CELL_PIXELS, 3)
    cells: np.ndarray = lines.sum(axis=2) / CELL_PIXELS**2
    return cells
