"""Random changes to a sample's images (spec section 4.1): colour alike in all views, a crop of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL.Image import Resampling

from xr0_engine.robot.history import newest
from xr0_engine.robot.views import cut_out, kept_sides

PROBABILITY = 0.5
BRIGHTNESS = (1 - 32 / 255, 1 + 32 / 255)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
# Of each side.
CROP = 0.95
# Rec. 601, as Pillow weighs the channels.
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def augment(
    images: Mapping[str, np.ndarray], rng: np.random.Generator, crops: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """New images (height, width, 3) uint8 of the same sizes; the draws depend on rng and the views' order alone.

    images: turned and resized, but not cropped; or videos, (frames, height, width, 3), in each of which all frames are
    changed by the same draws. crops: view -> the fraction of each side that its profile's centre crop keeps; a crop of
    that size at a random place stands for it. The other views lose what the recipe says.
    """
    crops = crops or {}
    factors = _factors(rng)
    changed = {}
    for view, image in images.items():
        cropped = _each(image, _crop(newest(image), rng, crops.get(view)))
        changed[view] = _each(cropped, lambda frame: recolor(frame, *factors))
    return changed


def recolor_alike(images: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """augment without the crops: of images that are cropped as at run time."""
    factors = _factors(rng)
    return {view: _each(image, lambda frame: recolor(frame, *factors)) for view, image in images.items()}


def _each(image: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A change of pictures, of an image or of each of a video's frames."""
    return change(image) if image.ndim == 3 else np.stack([change(frame) for frame in image])


def _factors(rng: np.random.Generator) -> list[float]:
    return [rng.uniform(*span) if rng.random() < PROBABILITY else 1.0 for span in (BRIGHTNESS, CONTRAST, SATURATION)]


def recolor(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Scale by brightness, then away from the image's mean grey, then away from each pixel's own grey; 1 = as it is."""
    if brightness == contrast == saturation == 1:
        return image
    pixels = np.clip(image.astype(np.float32) * np.float32(brightness), 0, 255)
    grey = np.float32((pixels @ LUMA).mean())
    pixels = np.clip(grey + np.float32(contrast) * (pixels - grey), 0, 255)
    greys = (pixels @ LUMA)[..., None]
    pixels = np.clip(greys + np.float32(saturation) * (pixels - greys), 0, 255)
    return np.rint(pixels).astype(np.uint8)


def _crop(
    like: np.ndarray, rng: np.random.Generator, fraction: float | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """A crop at one random place, of images of the size of the one that is given.

    fraction: of the profile's centre crop, whose rounding and filter hold then; None: the recipe's own crop.
    """
    height, width = like.shape[:2]
    if fraction is None:
        kept = max(1, round(CROP * height)), max(1, round(CROP * width))
    else:
        kept = kept_sides(like, fraction)
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip((height, width), kept, strict=True))
    resampling = Resampling.BICUBIC if fraction is None else Resampling.BILINEAR
    return lambda image: cut_out(image, top, left, *kept, resampling)
