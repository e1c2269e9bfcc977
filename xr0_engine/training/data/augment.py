"""Random changes to a sample's images (spec section 4.1): colour alike in all views, a crop of each."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

PROBABILITY = 0.5
BRIGHTNESS = (1 - 32 / 255, 1 + 32 / 255)
CONTRAST = (0.5, 1.5)
SATURATION = (0.5, 1.5)
# Of each side.
CROP = 0.95
# Rec. 601, as Pillow weighs the channels.
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def augment(images: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """New images (height, width, 3) uint8 of the same sizes; the draws depend on rng and the views' order alone."""
    factors = [rng.uniform(*span) if rng.random() < PROBABILITY else 1.0 for span in (BRIGHTNESS, CONTRAST, SATURATION)]
    return {view: recolor(_crop(image, rng), *factors) for view, image in images.items()}


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


def _crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    kept_height, kept_width = max(1, round(CROP * height)), max(1, round(CROP * width))
    top, left = rng.integers(height - kept_height + 1), rng.integers(width - kept_width + 1)
    kept = Image.fromarray(image[top : top + kept_height, left : left + kept_width])
    return np.asarray(kept.resize((width, height), Image.Resampling.BICUBIC))
