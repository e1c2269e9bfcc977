"""Camera images from the network: arrays as they are, JPEG and PNG decoded, and neither larger than allowed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from xr0_engine.robot.images import array_fault, check_size, read_picture
from xr0_engine.robot.picture_cost import PictureError

FORMATS = ("JPEG", "PNG")


def read_image(name: str, image: object, max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8 RGB from an array, (H, W, 3) or (3, H, W), or from the bytes of a JPEG or PNG file.

    Raises ValueError that names the image, before anything of more than max_pixels is decoded.
    """
    try:
        if isinstance(image, bytes):
            return read_picture(image, formats=FORMATS, max_pixels=max_pixels)
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] != 3 and image.shape[0] == 3:
            image = image.transpose(1, 2, 0)
        fault = array_fault(image)
        if fault or not isinstance(image, np.ndarray):
            raise PictureError(f"expected a JPEG or PNG file or a uint8 array (H, W, 3), got {fault}")
        check_size(image.shape[1], image.shape[0], max_pixels)
        return image
    except PictureError as error:
        raise ValueError(f"{name}: {error}") from None


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """image: (H, W, 3) uint8 RGB. quality: 1 to 95. Raises ValueError for another image."""
    fault = array_fault(image)
    if fault:
        raise ValueError(f"image: expected a uint8 array (H, W, 3), got {fault}")
    file = io.BytesIO()
    # Full colour resolution: the model was trained on frames that kept it.
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()
