"""A camera's frame to the picture that the model's processor is given: turned, resized, cropped (spec section 3.1)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from xr0_engine.robot.embodiment import View

# Bicubic is what Pillow's resize does if no filter is named, as in the evaluations of XR-0.
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def orient(image: np.ndarray, view: View) -> np.ndarray:
    """The picture that the view's profile makes of a frame, pixel for pixel what the released evaluations make of it.

    image: (H, W, 3) uint8, any strides. Turned by 180 degrees first; then brought to the view's size, its aspect not
    kept; then its middle cut out and brought back to that size. A frame that is only turned is a view of the argument.
    Videos, (frames, H, W, 3), frame by frame.
    """
    if image.ndim == 4:
        return _video(image, view)
    if view.rotate_180:
        image = image[::-1, ::-1]
    if view.resize is not None:
        image = _resized(image, view.resize, _FILTERS[view.resize_filter])
    if view.center_crop < 1:
        height, width = kept_sides(image, view.center_crop)
        image = cut_out(image, (image.shape[0] - height) // 2, (image.shape[1] - width) // 2, height, width)
    return image


def _video(frames: np.ndarray, view: View) -> np.ndarray:
    if view.resize is None and view.center_crop == 1:
        return frames[:, ::-1, ::-1] if view.rotate_180 else frames
    return np.stack([orient(frame, view) for frame in frames])


def kept_sides(image: np.ndarray, fraction: float) -> tuple[int, int]:
    """The height and width that a crop to this fraction of each side leaves: rounded down, at least 1."""
    height, width = image.shape[:2]
    return max(1, int(height * fraction)), max(1, int(width * fraction))


def cut_out(
    image: np.ndarray,
    top: int,
    left: int,
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """A part of the image, enlarged to the image's own size: (H, W, 3) uint8."""
    part = image[top : top + height, left : left + width]
    return _resized(part, (image.shape[0], image.shape[1]), resampling)


def _resized(image: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    height, width = size
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((width, height), resampling))
