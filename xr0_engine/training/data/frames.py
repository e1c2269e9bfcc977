"""A decoded frame as the picture that a player shows. PyAV."""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import VideoReformatter

from xr0_engine.training.data.samples import DataError

# Transfer functions of high dynamic range (ITU-T H.273): in 8 bits without tone mapping their pictures are pale.
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
# A display matrix is in 65536ths; less than this is rounding, and moves no pixel.
MATRIX_TOLERANCE = 1e-4


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(height, width, 3) uint8 RGB, read-only: what a player shows.

    Turned and mirrored as the file's display matrix says; pixels stay as they are stored, square or not, and so do
    both fields of interlaced video. Colours are converted as the file says; what names no colour space is BT.601.
    reformatter: the same for all frames of a file: setting one up costs more than converting a small frame. Raises
    DataError for alpha, grey, high dynamic range, and other matrices.
    """
    components = frame.format.components
    if any(component.is_alpha for component in components):
        raise DataError(f"has an alpha channel ({frame.format.name}): encode it without, on a background")
    if len(components) == 1 and not frame.format.has_palette:
        raise DataError(
            f"is grey ({frame.format.name}), expected colour: if the model shall see it, encode it as yuv420p"
        )
    if frame.color_trc in HDR_TRANSFERS:
        raise DataError(
            f"has high dynamic range ({HDR_TRANSFERS[frame.color_trc]}): encode it for standard dynamic range"
        )
    try:
        # Threads of its own are many times dearer to start than a frame is to convert, beside other readers above all.
        image = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    except (av.error.FFmpegError, ValueError) as error:
        raise DataError(
            f"has colours ({frame.format.name}, colour space {int(frame.colorspace)}) that cannot be brought to "
            f"RGB: {error}: encode it as yuv420p of BT.709 or BT.601"
        ) from None
    # Its stub calls it a mapping of text.
    side_data: Any = frame.side_data
    matrix = side_data.get(SideDataType.DISPLAYMATRIX)
    if matrix is not None:
        image = displayed(image, np.frombuffer(matrix, np.int32))
    # Callers share it.
    image.flags.writeable = False
    return image


def displayed(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(height, width, 3) as a player shows it: turned by a multiple of 90 degrees, mirrored, or both.

    matrix: the nine numbers of an MP4's display matrix; the first two of its first two rows say where right and down
    of the stored picture go, each as (right, down). One of zeros says nothing. Raises DataError for any other angle,
    and for stretching.
    """
    cells = matrix[[0, 1, 3, 4]].astype(np.float64)
    if not cells.any():
        return image
    cells /= np.abs(cells).max()
    right_to_right, right_to_down, down_to_right, down_to_down = signs = np.rint(cells)
    is_turned = bool(right_to_down)
    across = (right_to_down, down_to_right) if is_turned else (right_to_right, down_to_down)
    if np.abs(cells - signs).max() > MATRIX_TOLERANCE or np.abs(signs).sum() != 2 or not all(across):
        raise DataError(
            f"has a display matrix {matrix[[0, 1, 3, 4]].tolist()} that does not turn by a multiple of 90 degrees: "
            "encode it upright"
        )
    if is_turned:
        image = image.transpose(1, 0, 2)
    horizontal, vertical = (down_to_right, right_to_down) if is_turned else (right_to_right, down_to_down)
    return np.ascontiguousarray(image[:: int(vertical), :: int(horizontal)])
