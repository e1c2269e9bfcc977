"""Picture files: upright, in eight bits, or refused with the remedy; every reader alike."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tests.robot.test_picture_cost import many_scans
from xr0_engine.robot import images
from xr0_engine.robot.images import array_fault, read_picture
from xr0_engine.robot.picture_cost import MAX_SCANS, PictureError

# A JPEG of smooth pictures at the best quality, and Pillow's way from CMYK.
JPEG_NOISE = 8


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth, so that JPEG keeps it, and different at each side."""
    rows, columns = np.mgrid[0:24, 0:32]
    return np.stack([rows * 10, columns * 7, 255 - rows * 5 - columns * 4], axis=2).astype(np.uint8)


def file_of(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def with_tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What a viewer does to the stored pixels, as the EXIF standard says where row 0 and column 0 are.
SHOWN = {
    0: lambda a: a,
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(picture, kind, orientation):
    data = file_of(picture, kind, exif=with_tag(orientation), **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(read_picture(data), SHOWN[orientation](picture))


def test_orientation_of_a_jpeg(picture):
    data = file_of(picture, "JPEG", quality=100, subsampling=0, exif=with_tag(6))
    read = read_picture(data)
    assert read.shape == (32, 24, 3)
    assert np.abs(read.astype(int) - np.rot90(picture, -1)).max() <= JPEG_NOISE


def test_orientation_beside_what_cannot_be_written_again(picture):
    """Cameras put values into EXIF data that Pillow reads, but does not write."""
    exif = with_tag(6)
    exif[0x011A] = 72.0
    # The resolution, a fraction, entered as text.
    number, text = struct.pack(">HH", 0x011A, 5), struct.pack(">HH", 0x011A, 2)
    assert exif.tobytes().count(number) == 1
    block = exif.tobytes().replace(number, text)
    data = file_of(picture, "JPEG", quality=100, subsampling=0, exif=block)
    read = read_picture(data)
    assert np.abs(read.astype(int) - np.rot90(picture, -1)).max() <= JPEG_NOISE


@pytest.mark.parametrize("orientation", [1, 6])
def test_upper_byte_of_16_bit_grey(orientation):
    values = np.arange(0, 65536, 131, dtype=np.uint16)[:500].reshape(20, 25)
    data = file_of(values, exif=with_tag(orientation))
    expected = SHOWN[orientation](np.repeat(values[..., None] >> 8, 3, axis=2))
    np.testing.assert_array_equal(read_picture(data, grey=True), expected)


def test_upper_byte_of_16_bit_colour(picture):
    """Written by hand, as Pillow writes none: the lower byte is noise."""
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    rows = np.stack([picture, noise], axis=-1).reshape(24, -1)
    raw = zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", raw) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(read_picture(data), picture)


@pytest.mark.parametrize("mode", ["RGB", "P", "CMYK", "YCbCr"])
def test_colours_of_every_mode(picture, mode):
    stored = Image.fromarray(picture).convert(mode)
    data = file_of(stored, "PNG" if mode in ("RGB", "P") else "TIFF")
    np.testing.assert_array_equal(read_picture(data), np.asarray(stored.convert("RGB")))


def test_cmyk_jpeg_is_no_negative(picture):
    data = file_of(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=100)
    assert np.abs(read_picture(data).astype(int) - picture).max() <= JPEG_NOISE


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_is_taken_only_where_asked_for(picture, mode):
    stored = Image.fromarray(picture).convert(mode)
    read = read_picture(file_of(stored), grey=True)
    np.testing.assert_array_equal(read, np.asarray(stored.convert("RGB")))
    with pytest.raises(PictureError, match="a grey image: if the model shall see it, repeat it in three channels"):
        read_picture(file_of(stored))


def transparent(picture, mode):
    image = Image.fromarray(picture).convert(mode)
    if mode == "P":
        return file_of(image, transparency=3)
    if mode == "RGB":
        return file_of(image, transparency=(0, 0, 255))
    return file_of(image)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_alpha_is_refused_with_the_remedy(picture, mode):
    with pytest.raises(PictureError, match="has an alpha channel: lay it on a background, or drop the alpha channel"):
        read_picture(transparent(picture, mode), grey=True)


def test_same_words_for_arrays(picture):
    alpha = np.dstack([picture, picture[..., 0]])
    assert "an image with alpha: lay it on a background, or drop the alpha channel" in array_fault(alpha)
    assert "a grey image: if the model shall see it, repeat it in three channels" in array_fault(picture[..., 0])
    assert array_fault(picture) is None


def test_remedy_for_numbers_that_are_no_bytes(picture):
    for kind, remedy in ((np.float32, "(255 * image)"), (np.uint16, ">> 8"), (np.int64, "image.astype(np.uint8)")):
        assert remedy in array_fault(picture.astype(kind))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_animation_is_refused(picture, kind):
    frames = [Image.fromarray(picture + np.uint8(step)) for step in (0, 9)]
    data = file_of(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match=r"expected one picture, but .* bytes holds several"):
        read_picture(data)


def test_picture_of_a_jpeg_with_previews_is_the_first(picture):
    first = Image.fromarray(picture)
    data = file_of(first, "MPO", save_all=True, append_images=[ImageOps.invert(first)], quality=100, subsampling=0)
    assert np.abs(read_picture(data, formats=("JPEG", "PNG")).astype(int) - picture).max() <= JPEG_NOISE


@pytest.mark.parametrize("mode", ["F", "I"])
def test_unknown_range_is_refused(mode):
    with pytest.raises(PictureError, match=f"8 or 16 bits per channel, but .* is of mode {mode}"):
        read_picture(file_of(Image.new(mode, (4, 4)), "TIFF"), grey=True)


def test_size_is_limited_before_anything_is_decoded(picture, monkeypatch):
    data = file_of(picture)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="expected at most 767 pixels, got 32 x 24"):
        read_picture(data, max_pixels=767)


def test_cost_is_limited_before_anything_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    path = tmp_path / "front.jpg"
    path.write_bytes(many_scans(MAX_SCANS + 1))
    for source in (path, path.read_bytes()):
        with pytest.raises(PictureError, match="expected a JPEG of at most 32 scans, got 33: save it as a baseline"):
            read_picture(source)
    monkeypatch.setattr(images, "MAX_BYTES", 1024)
    path.write_bytes(bytes(1025))
    with pytest.raises(PictureError, match=r"front\.jpg: expected at most 1 KiB"):
        read_picture(path)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "EPS"])
def test_formats_whose_cost_is_unknown_are_refused(picture, kind):
    """Pillow would run Ghostscript for the last."""
    with pytest.raises(PictureError, match=r"expected a JPEG, PNG, WEBP or TIFF file, but .* cannot be read"):
        read_picture(file_of(picture, kind))


@pytest.mark.parametrize("cut", [0, 7, 40, 200])
def test_cut_off_file_is_named(picture, tmp_path, cut):
    path = tmp_path / "front.png"
    path.write_bytes(file_of(np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8))[:cut])
    with pytest.raises(PictureError, match=r"expected a JPEG, PNG, WEBP or TIFF file, but .*front\.png cannot be read"):
        read_picture(path)
    with pytest.raises(PictureError, match=f"expected a JPEG or PNG file, but .* {cut} bytes cannot be read"):
        read_picture(path.read_bytes(), formats=("JPEG", "PNG"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_broken_bytes_are_refused_or_read(picture, kind):
    """Whatever the bytes, an array or a PictureError: the EXIF block is among what is broken."""
    rng = np.random.default_rng(0)
    sound = np.frombuffer(file_of(picture, kind, exif=with_tag(6)), np.uint8)
    for _ in range(400):
        broken = sound.copy()
        at = rng.integers(min(len(broken), 400), size=rng.integers(1, 6))
        broken[at] = rng.integers(0, 256, at.size)
        try:
            read = read_picture(broken.tobytes(), max_pixels=10_000, grey=True)
        except PictureError:
            continue
        assert (read.dtype, read.shape[2]) == (np.uint8, 3)


def test_text_in_a_png_is_no_transparency(picture):
    facts = PngInfo()
    facts.add_text("transparency", "none")
    data = file_of(picture, pnginfo=facts)
    np.testing.assert_array_equal(read_picture(data), picture)


def test_reading_needs_no_torch():
    code = "import sys, xr0_engine.robot.images, xr0_engine.serve.images; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
