"""A frame's colours, and how it lies."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest

from tests.training.data.fixtures import HEIGHT, WIDTH, encode_video
from xr0_engine.training.data.frames import displayed
from xr0_engine.training.data.samples import DataError
from xr0_engine.training.data.video import Clip

# Luma and chroma of a strong colour: the matrices of BT.601 and BT.709 take it 20 of 255 apart and more.
Y, U, V = 120, 90, 190
BT709, BT601, UNSPECIFIED = 1, 6, 2
WEIGHTS = {BT709: (0.2126, 0.0722), BT601: (0.299, 0.114), UNSPECIFIED: (0.299, 0.114)}
LIMITED, FULL = 1, 2
# Rounding to 8 bits before and after the conversion, and its tables.
TOLERANCE = 4
# The 16.16 numbers of a matrix.
ONE = 1 << 16


def expected(space, is_full):
    """The colour by the definition of ITU-R BT.601 and BT.709."""
    luma, blue, red = (Y / 255, U - 128, V - 128) if is_full else ((Y - 16) / 219, U - 128, V - 128)
    blue, red = (value / (255 if is_full else 224) for value in (blue, red))
    of_red, of_blue = WEIGHTS[space]
    r, b = luma + 2 * (1 - of_red) * red, luma + 2 * (1 - of_blue) * blue
    g = (luma - of_red * r - of_blue * b) / (1 - of_red - of_blue)
    return 255 * np.clip([r, g, b], 0, 1)


def flat_video(path, pix_fmt, space, colour_range, codec="libx264", options=None, transfer=None):
    """One colour, not converted by anybody."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options={"qp": "0"} if options is None else options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        context = stream.codec_context
        context.colorspace, context.color_range = space, colour_range
        if transfer is not None:
            context.color_trc = transfer
        frame = av.VideoFrame(64, 48, pix_fmt)
        frame.colorspace, frame.color_range = space, colour_range
        if transfer is not None:
            frame.color_trc = transfer
        deep = frame.format.components[0].bits > 8
        for plane, value in zip(frame.planes, (Y, U, V), strict=False):
            samples = np.full(plane.buffer_size // (2 if deep else 1), value << 2 if deep else value)
            plane.update(samples.astype(np.uint16 if deep else np.uint8).tobytes())
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("pix_fmt", "space", "colour_range"),
    [
        pytest.param("yuv420p", BT709, LIMITED, id="BT.709"),
        pytest.param("yuv420p", BT601, LIMITED, id="BT.601"),
        pytest.param("yuv420p", UNSPECIFIED, LIMITED, id="unspecified"),
        pytest.param("yuv444p", BT709, LIMITED, id="BT.709, 4:4:4"),
        pytest.param("yuv420p10le", BT709, LIMITED, id="BT.709, 10 bits"),
        pytest.param("yuv420p", BT709, FULL, id="BT.709, full range"),
        pytest.param("yuvj420p", UNSPECIFIED, FULL, id="full range by its format"),
    ],
)
def test_colours_are_those_that_the_file_means(tmp_path, pix_fmt, space, colour_range):
    image = Clip(flat_video(tmp_path / "v.mp4", pix_fmt, space, colour_range), 0.0, 1, 30.0).read(0)
    right = expected(space, colour_range == FULL)
    others = [expected(other, colour_range == FULL) for other in WEIGHTS if WEIGHTS[other] != WEIGHTS[space]]
    assert np.abs(image[24, 32] - right).max() < TOLERANCE
    assert all(np.abs(image[24, 32] - other).max() > 2 * TOLERANCE for other in others)


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        pytest.param(
            {"pix_fmt": "gray", "codec": "png", "options": {}},
            r"is grey \(gray\), expected colour: .*encode it as yuv420p",
            id="grey",
        ),
        pytest.param(
            {"pix_fmt": "rgba", "codec": "png", "options": {}}, r"has an alpha channel \(rgba\): encode", id="alpha"
        ),
        pytest.param({"pix_fmt": "yuv420p10le", "transfer": 16}, r"high dynamic range \(PQ\): encode", id="PQ"),
        pytest.param({"pix_fmt": "yuv420p10le", "transfer": 18}, r"high dynamic range \(HLG\): encode", id="HLG"),
        pytest.param({"pix_fmt": "yuv444p", "space": 8}, "colour space 8.* encode it as yuv420p", id="YCoCg"),
    ],
)
def test_pictures_that_have_no_plain_colours_are_refused(tmp_path, facts, complaint):
    suffix = "mov" if facts.get("codec") == "png" else "mp4"
    path = flat_video(tmp_path / f"v.{suffix}", **({"space": UNSPECIFIED, "colour_range": LIMITED} | facts))
    with pytest.raises(DataError, match=rf"v.{suffix}: frame 0 of the clip: .*{complaint}"):
        Clip(path, 0.0, 1, 30.0).read(0)


def with_matrix(path, cells):
    """Write the first two columns of the first two rows into the track header of an MP4."""
    content = bytearray(path.read_bytes())
    # Version, flags, two times, the track, reserved, the duration, reserved, layer, group, volume, reserved.
    place = content.index(b"tkhd") + 4 + 40
    a, b, c, d = cells
    struct.pack_into(">9i", content, place, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))
    return path


def scene():
    """Red at the left above, green at the right above, blue at the left below."""
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    image[:12, :20], image[:12, -20:], image[-12:, :20] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


MATRICES = {
    "none": ((ONE, 0, 0, ONE), lambda image: image),
    "90 degrees clockwise": ((0, ONE, -ONE, 0), lambda image: np.rot90(image, -1)),
    "180 degrees": ((-ONE, 0, 0, -ONE), lambda image: image[::-1, ::-1]),
    "270 degrees clockwise": ((0, -ONE, ONE, 0), lambda image: np.rot90(image)),
    "mirrored": ((-ONE, 0, 0, ONE), lambda image: image[:, ::-1]),
    "upside down": ((ONE, 0, 0, -ONE), lambda image: image[::-1]),
    "mirrored along the diagonal": ((0, ONE, ONE, 0), lambda image: image.transpose(1, 0, 2)),
    "rounded": ((2, ONE, -ONE + 1, 0), lambda image: np.rot90(image, -1)),
    "zeros": ((0, 0, 0, 0), lambda image: image),
}


@pytest.mark.parametrize(("cells", "shown"), MATRICES.values(), ids=MATRICES)
def test_display_matrix_is_applied(tmp_path, cells, shown):
    path = encode_video(tmp_path / "v.mp4", [scene()] * 3)
    stored = Clip(path, 0.0, 3, 30.0).read(1)
    turned = Clip(with_matrix(path, cells), 0.0, 3, 30.0).read(1)
    np.testing.assert_array_equal(turned, shown(stored))
    # Of a player's picture, the one that is turned clockwise has red at the right above.
    if cells == MATRICES["90 degrees clockwise"][0]:
        assert turned.shape == (WIDTH, HEIGHT, 3)
        assert turned[5, -5].argmax() == 0


def test_crop_is_of_the_displayed_picture(tmp_path):
    path = with_matrix(encode_video(tmp_path / "v.mp4", [scene()] * 3), (0, ONE, -ONE, 0))
    whole = Clip(path, 0.0, 3, 30.0).read(0)
    np.testing.assert_array_equal(Clip(path, 0.0, 3, 30.0, (4, 30, 32, 80)).read(0), whole[30:80, 4:32])
    with pytest.raises(DataError, match=f"crop_bbox .*{HEIGHT}x{WIDTH}"):
        Clip(path, 0.0, 3, 30.0, (0, 0, WIDTH, HEIGHT)).read(0)


@pytest.mark.parametrize(
    "cells",
    [(46341, 46341, -46341, 46341), (ONE, 0, ONE // 2, ONE), (2 * ONE, 0, 0, ONE), (0, 0, 0, ONE)],
    ids=["45 degrees", "sheared", "stretched", "flat"],
)
def test_other_matrices_are_refused(cells):
    matrix = np.array([cells[0], cells[1], 0, cells[2], cells[3], 0, 0, 0, 1 << 30], np.int32)
    with pytest.raises(DataError, match=r"display matrix .* does not turn by a multiple of 90 degrees: encode"):
        displayed(scene(), matrix)
