"""Camera images from the network: arrays as they are, JPEG and PNG decoded, and neither larger than allowed."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG")

# What Pillow raises for files that are broken, cut off, or more than they claim.
_BROKEN = (OSError, SyntaxError, ValueError, struct.error, EOFError, IndexError, Image.DecompressionBombError)


def read_image(name: str, image: object, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB from an array, (H, W, 3) or (3, H, W), or from the bytes of a JPEG or PNG file.

    Raises ValueError that names the image, before anything of more than max_pixels is decoded.
    """
    if isinstance(image, bytes):
        return _decode(name, image, max_pixels)
    wanted = f"{name}: expected a JPEG or PNG file or a uint8 array (H, W, 3), got"
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{wanted} {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or 3 not in image.shape[::2]:
        raise ValueError(f"{wanted} {image.dtype} {image.shape}")
    array: np.ndarray = image if image.shape[2] == 3 else image.transpose(1, 2, 0)
    _check_size(name, array.shape[1], array.shape[0], max_pixels)
    return array


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """image: (H, W, 3) uint8 RGB. quality: 1 to 95."""
    file = io.BytesIO()
    # Full colour resolution: the model was trained on frames that kept it.
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def _decode(name: str, data: bytes, max_pixels: int) -> np.ndarray:
    try:
        # Only the header is read here.
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            _check_size(name, picture.width, picture.height, max_pixels)
            return np.asarray(picture.convert("RGB"))
    except _BROKEN as error:
        if isinstance(error, _TooLarge):
            raise
        reason = f"{len(data)} bytes that Pillow cannot read: {error}"
        raise ValueError(f"{name}: expected a JPEG or PNG file, got {reason}") from None


class _TooLarge(ValueError):
    pass


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    if not 0 < width * height <= max_pixels:
        raise _TooLarge(f"{name}: expected at most {max_pixels} pixels, got {width} x {height}")
