"""Random changes to a sample's images (spec section 4.1): colour alike in all views, a crop of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL.Image import Resampling

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

    images: turned and resized, but not cropped. crops: view -> the fraction of each side that its profile's centre crop
    keeps; a crop of that size at a random place stands for it. The other views lose what the recipe says.
    """
    crops = crops or {}
    factors = _factors(rng)
    return {view: recolor(_crop(image, rng, crops.get(view)), *factors) for view, image in images.items()}


def recolor_alike(images: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """augment without the crops: of images that are cropped as at run time."""
    factors = _factors(rng)
    return {view: recolor(image, *factors) for view, image in images.items()}


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


def _crop(image: np.ndarray, rng: np.random.Generator, fraction: float | None = None) -> np.ndarray:
    """fraction: of the profile's centre crop, whose rounding and filter hold then; None: the recipe's own crop."""
    height, width = image.shape[:2]
    if fraction is None:
        kept = max(1, round(CROP * height)), max(1, round(CROP * width))
    else:
        kept = kept_sides(image, fraction)
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip((height, width), kept, strict=True))
    return cut_out(image, top, left, *kept, Resampling.BICUBIC if fraction is None else Resampling.BILINEAR)
