"""Pictures from outside, as arrays and as files: taken as what they show, or refused with the reason and the remedy.

It needs no torch: a robot's side reads pictures too.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from xr0_engine.files import read_bytes
from xr0_engine.robot.picture_cost import PictureError, decoding_cost

# What Pillow raises for files that are broken, cut off, or more than they claim.
_BROKEN = (
    OSError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    EOFError,
    MemoryError,
    Image.DecompressionBombError,
)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
"""Those whose cost is known before they are decoded (picture_cost.py). Pillow's EPS would run another program."""

MAX_PIXELS = 1 << 26
"""8192 x 8192, the most that a checkpoint may keep of a picture; decoded, and turned upright, they take 0.9 GiB, as
WebP 1.4."""

MAX_BYTES = 256 << 20
"""Of a file: as many pixels as are taken, not packed, and a third more."""

MAX_ASPECT = 200
"""Of a side to the other, as the released image processor has it."""

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")

_NO_ALPHA = "lay it on a background, or drop the alpha channel"
# Of an array that is not uint8, by the kind of its numbers. What they mean, only its owner knows.
_BYTES_REMEDY = {
    "u": ": take the upper byte, `(image >> 8).astype(np.uint8)` of 16 bits",
    "f": ": if it runs from 0 to 1, `(255 * image).round().astype(np.uint8)`",
    "i": ": if it runs from 0 to 255, `image.astype(np.uint8)`",
}
_NO_GREY = "if the model shall see it, repeat it in three channels"


def array_fault(image: object) -> str | None:
    """Why an array is no camera image, (H, W, 3) uint8 RGB, with the remedy; None if it is one."""
    if not isinstance(image, np.ndarray):
        return f"{type(image).__name__}; only NumPy arrays are taken"
    if image.dtype != np.uint8:
        return f"dtype {image.dtype}{_BYTES_REMEDY.get(image.dtype.kind, '')}"
    if image.ndim == 2:
        return f"shape {image.shape}, a grey image: {_NO_GREY}"
    if image.ndim != 3:
        return f"shape {image.shape}"
    if image.size == 0:
        return f"shape {image.shape}, an empty image"
    height, _, channels = image.shape
    if channels == 3:
        return None
    if height in (1, 3, 4):
        return f"shape {image.shape}: channels last expected, these look like channels first"
    said = {1: f", a grey image: {_NO_GREY}", 2: ", a grey image with alpha", 4: f", an image with alpha: {_NO_ALPHA}"}
    return f"shape {image.shape}{said.get(channels, '')}"


def aspect_fault(height: int, width: int) -> str | None:
    """Why the model's processor cannot take a picture of these sides; None if it can."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        return f"height {height}, width {width}: the aspect ratio is above {MAX_ASPECT}"
    return None


def read_picture(
    source: bytes | Path,
    *,
    formats: tuple[str, ...] = FORMATS,
    max_pixels: int = MAX_PIXELS,
    grey: bool = False,
) -> np.ndarray:
    """What a picture file shows, upright as its EXIF orientation says: (H, W, 3) uint8 RGB.

    source: the file's bytes or its path. formats: of FORMATS, those that are taken. max_pixels: nothing larger is
    decoded. grey: take a grey picture, its value in all three channels; a camera's is refused, as an array without
    colour is. Of 16 bits per channel the upper 8 are taken. Raises PictureError for what is broken, too large, costs
    more than its size lets expect, has alpha or several frames, or values whose range is unknown.
    """
    what = str(source) if isinstance(source, Path) else f"the file of {len(source)} bytes"
    try:
        data = read_bytes(source, PictureError, MAX_BYTES) if isinstance(source, Path) else source
        decoding_cost(data, max_pixels)
        # Only the header is read here.
        with Image.open(io.BytesIO(data), formats=formats) as picture:
            check_size(picture.width, picture.height, max_pixels)
            _refuse_kind(picture, what, grey)
            upright = _upright(picture)
            if _is_deep_grey(picture):
                values = (np.asarray(upright) >> 8).astype(np.uint8)
                return np.repeat(values[..., None], 3, axis=2)
            # Pillow would make another copy.
            return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except PictureError:
        raise
    except _BROKEN as error:
        kind = f"a {' or '.join([', '.join(formats[:-1]), formats[-1]] if formats[1:] else formats)} file"
        raise PictureError(f"expected {kind}, but {what} cannot be read: {error}") from None


# EXIF orientation -> what makes such a picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(picture: Image.Image) -> Image.Image:
    # Pillow turns TIFF files itself while it loads them. Its own function for the others writes the EXIF data anew,
    # which fails for much of what cameras put there.
    picture.load()
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    return picture if turn is None else picture.transpose(turn)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises PictureError for more pixels than that, or none."""
    if not 1 <= width * height <= max_pixels:
        raise PictureError(f"expected at most {max_pixels} pixels, got {width} x {height}")


def _refuse_kind(picture: Image.Image, what: str, grey: bool) -> None:
    # A JPEG may carry previews or a gain map behind its picture (MPO); the picture is the first.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise PictureError(f"expected one picture, but {what} holds several: save the one that is meant as a file")
    colours = picture.palette.mode if picture.mode == "P" and picture.palette else picture.mode
    # Text in a PNG file may bear the same name.
    transparency = picture.info.get("transparency")
    if colours in _ALPHA_MODES or not (transparency is None or isinstance(transparency, str)):
        raise PictureError(f"expected a picture without transparency, but {what} has an alpha channel: {_NO_ALPHA}")
    is_grey = picture.mode in ("1", "L") or _is_deep_grey(picture)
    if is_grey and not grey:
        raise PictureError(f"expected a picture in colour, but {what} is a grey image: {_NO_GREY}")
    if not is_grey and picture.mode not in ("RGB", "P", "CMYK", "YCbCr"):
        raise PictureError(f"expected 8 or 16 bits per channel, but {what} is of mode {picture.mode}: save it as RGB")


def _is_deep_grey(picture: Image.Image) -> bool:
    """Whether it is grey of 16 bits. Of 16-bit colours Pillow itself reads the upper 8."""
    # Mode I has 32 bits, but a PNG file never more than 16: older versions of Pillow open those of 16 as I.
    return picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG")
