"""What pictures cost is known before they are decoded, and what cameras send is taken."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from xr0_engine.robot.picture_cost import (
    MAX_CHUNKS,
    MAX_EXIF_ENTRIES,
    MAX_HEADER_BYTES,
    MAX_PARTS,
    MAX_SCANS,
    PictureError,
    decoding_cost,
)

MAX_PIXELS = 4 << 20
FRAME = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def saved(kind: str, image: np.ndarray = FRAME, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


def segment(kind: int, body: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


JPEG = saved("JPEG")
PNG = saved("PNG")
WEBP = saved("WEBP", exif=Image.Exif())
HEADER_END = 8 + 25


def many_scans(count: int, side: int = 64) -> bytes:
    """A grey progressive picture of nothing, with one scan for its averages and more for nothing at all.

    Each of these is one code for as many blocks as one can stand for, however many the picture has.
    """
    blocks = (side // 8) ** 2
    tables = segment(0xC4, b"\0\1" + bytes(15) + b"\0") + segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    first = segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    runs = "".join("0" + "1" * 14 for _ in range(-(-blocks // (2**15 - 1))))
    packed = int(runs + "1" * (-len(runs) % 8), 2).to_bytes(-(-len(runs) // 8), "big").replace(b"\xff", b"\xff\0")
    again = segment(0xDA, b"\1\1\0\1\x3f\0") + packed
    return b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + frame + tables + first + again * (count - 1) + b"\xff\xd9"


def exif(entries: int, size: int = 0) -> bytes:
    """A directory each of whose entries is all of it."""
    body = b"".join(struct.pack("<HHII", tag + 1, 7, 12 * entries, 8) for tag in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + body + bytes(max(size, 4))


def with_segments(*segments: bytes) -> bytes:
    return JPEG[:2] + b"".join(segments) + JPEG[2:]


def with_chunks(*chunks: bytes) -> bytes:
    return PNG[:HEADER_END] + b"".join(chunks) + PNG[HEADER_END:]


def between_scans(*segments: bytes, count: int = 2) -> bytes:
    """A progressive picture of so many scans, with these behind the first one."""
    data = many_scans(count)
    at = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    return data[:at] + b"".join(segments) + data[at:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff(entries: int, count: int, kind: int = 7) -> bytes:
    """A directory whose entries are all the same count of values, from the file's beginning."""
    body = b"".join(struct.pack("<HHII", 256 + tag, kind, count, 8) for tag in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + body + bytes(4)


FILM = np.random.default_rng(0).integers(0, 256, 1 << 23, dtype=np.uint8).tobytes()
LARGE = np.zeros((2048, 2048, 3), np.uint8)

TAKEN = {
    "baseline": (JPEG, 1),
    "progressive": (saved("JPEG", progressive=True), 10),
    "progressive CMYK": (saved("JPEG", np.asarray(Image.fromarray(FRAME).convert("RGB")), progressive=True), 10),
    "largest progressive": (saved("JPEG", LARGE, progressive=True), 10),
    "with a profile": (saved("JPEG", icc_profile=bytes(200_000)), 1),
    "with EXIF": (with_segments(segment(0xE1, b"Exif\0\0" + exif(20))), 1),
    "with a comment": (with_segments(segment(0xFE, b"from a camera"), b"\xff\xff"), 1),
    "small with more scans": (many_scans(MAX_SCANS), MAX_SCANS),
    "with a film behind it, as phones do": (JPEG + FILM, 1),
    "with what looks like scans in a segment": (with_segments(segment(0xED, b"\xff\xda" * 99)), 1),
    "with tables, restarts and lines between scans": (
        between_scans(segment(0xC4, b"\x10\1" + bytes(15) + b"\xe0"), b"\xff\xd3" * 600, segment(0xDC, b"\0\x40")),
        2,
    ),
    "PNG": (PNG, 1),
    "largest PNG": (saved("PNG", np.random.default_rng(0).integers(0, 256, LARGE.shape, dtype=np.uint8)), 1),
    "PNG with EXIF": (with_chunks(chunk(b"eXIf", exif(20))), 1),
    "PNG with text": (with_chunks(chunk(b"tEXt", b"Author\0me")), 1),
    "WebP": (WEBP, 0),
    "TIFF": (saved("TIFF", LARGE), 0),
    "TIFF in tiles": (saved("TIFF", compression="tiff_deflate"), 0),
    "no picture": (b"GIF89a", 0),
    "nothing": (b"", 0),
    "half a JPEG": (JPEG[:20], 0),
    "half a PNG": (PNG[:20], 0),
}


@pytest.mark.parametrize(("data", "scans"), TAKEN.values(), ids=TAKEN)
def test_what_cameras_send_is_taken(data, scans):
    pixels = 0
    if scans:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                pixels = image.width * image.height
    assert decoding_cost(data, MAX_PIXELS) == pixels * scans


BOMBS = {
    "scans": (many_scans(MAX_SCANS + 1), f"JPEG of at most {MAX_SCANS} scans, got {MAX_SCANS + 1}"),
    "scans of a large one": (many_scans(13, 2048), "JPEG of at most 12 scans, got 13"),
    "thousands of scans": (many_scans(10_000), "scans, got 10000"),
    "comments": (with_segments(segment(0xFE, b"") * MAX_PARTS), "segments before the JPEG's first scan"),
    "filling": (with_segments(b"\xff" * MAX_PARTS), "segments before the JPEG's first scan"),
    "nonsense": (with_segments(b"\0" * MAX_PARTS), "segments before the JPEG's first scan"),
    "restarts": (with_segments(b"\xff\xd0" * 10), "got marker ffd0 at byte 2"),
    "extensions": (with_segments(b"\xff\xf0" + b"\xff" * 5000), "got marker fff0 at byte 2"),
    "header": (with_segments(segment(0xE5, bytes(65_000)) * 70), f"at most {MAX_HEADER_BYTES} bytes before"),
    "EXIF": (with_segments(segment(0xE1, b"Exif\0\0" + exif(MAX_EXIF_ENTRIES + 1))), "entries of EXIF, got 513"),
    "EXIF in parts": (
        with_segments(segment(0xE1, b"Exif\0\0" + exif(20, 60_000)), segment(0xE1, b"Exif\0\0" + bytes(60_000))),
        "bytes of EXIF",
    ),
    "previews": (with_segments(segment(0xE2, b"MPF\0" + exif(MAX_EXIF_ENTRIES + 1))), "entries of EXIF, got 513"),
    "chunks": (with_chunks(chunk(b"IDAT", b"") * MAX_CHUNKS), f"at most {MAX_CHUNKS} chunks in the PNG"),
    "EXIF in a PNG": (with_chunks(chunk(b"eXIf", exif(MAX_EXIF_ENTRIES + 1))), "entries of EXIF, got 513"),
    "large EXIF in a PNG": (with_chunks(chunk(b"eXIf", exif(20, 1 << 20))), "bytes of EXIF, got 1048"),
    "EXIF as text": (
        with_chunks(chunk(b"zTXt", b"Raw profile type exif\0\0")),
        "is a chunk of its own, got it as text",
    ),
    "scans behind what looks like an end": (
        between_scans(segment(0xFE, b"\xff\xd9"), count=MAX_SCANS + 1),
        f"scans, got {MAX_SCANS + 1}",
    ),
    "comments between scans": (
        between_scans(segment(0xFE, b"") * (MAX_PARTS + 1)),
        "segments after the JPEG's first scan",
    ),
    "extensions between scans": (between_scans(b"\xff\x02" * (MAX_PARTS + 1)), "segments after the JPEG's first scan"),
    "EXIF in a WebP": (webp((b"VP8X", bytes(10)), (b"EXIF", exif(MAX_EXIF_ENTRIES + 1))), "entries of EXIF, got 513"),
    "chunks of a WebP": (webp(*[(b"JUNK", b"")] * MAX_CHUNKS), f"at most {MAX_CHUNKS} chunks in the WebP"),
    "entries of a TIFF": (tiff(MAX_EXIF_ENTRIES + 1, 1), f"at most {MAX_EXIF_ENTRIES} entries in the TIFF"),
    "TIFF that names the same bytes again and again": (tiff(20, 100), "name less than its 254 bytes, got 2000"),
    "EXIF of many": (
        with_segments(segment(0xE1, b"Exif\0\0MM\0+" + struct.pack(">HHQQ", 8, 0, 16, 1 << 40))),
        f"entries of EXIF, got {1 << 40}",
    ),
}


@pytest.mark.parametrize(("data", "complaint"), BOMBS.values(), ids=BOMBS)
def test_what_costs_more_than_it_seems_is_refused(data, complaint):
    with pytest.raises(PictureError, match=f"^expected .*{complaint}"):
        decoding_cost(data, MAX_PIXELS)
