"""What a picture file costs to decode, told from its structure before anything is decoded.

Pixels alone do not tell: a progressive JPEG walks the whole picture once per scan, and a scan takes a hundred bytes;
Pillow steps through a file's parts in Python, and a part takes a few bytes; its EXIF directory may name the same bytes
thousands of times. All of it is counted, and refused beyond what cameras and encoders write.
"""

from __future__ import annotations

import struct

MAX_SCANS = 32
"""Of a JPEG. Encoders make 10 of a picture in colour, 18 of one in CMYK; previews in the file count too."""

SCANS_AT_FULL_SIZE = 12
"""Of a JPEG of as many pixels as are taken: half a second on one core. A smaller one may have more."""

MAX_PARTS = 512
"""Segments and fill bytes before a JPEG's first scan. Colour profiles take a few, 255 at the very most."""

MAX_HEADER_BYTES = 4 << 20
"""Before a JPEG's first scan: a colour profile, EXIF, a phone's depth map."""

MAX_CHUNKS = 2048
"""Of a PNG. libpng writes 8 KiB each, so 4 Mi pixels of noise take 1,600."""

MAX_EXIF_BYTES = 1 << 16
MAX_EXIF_ENTRIES = 512
"""Of an EXIF directory. Cameras write some twenty; each may stand for as many bytes as there are."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN = 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Before the first scan, each with its length: frames, tables, restart interval, APPn, comments. What has no length
# (restarts, extensions) does not belong there, and readers disagree about it.
_SEGMENTS = {*range(0xC0, 0xD0), 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE} - {0xC8}
_EXIF, _PREVIEWS = b"Exif\0\0", b"MPF\0"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


def decoding_cost(name: str, data: bytes, max_pixels: int) -> int:
    """Pixels that decoding a JPEG or PNG file walks over: its own, times its scans. 0 for what is no such file.

    name: of the image, for the error. max_pixels: of the largest that is taken. Raises ValueError for a file that takes
    more than its size lets expect; one that is too large or broken is for those who decode it to refuse.
    """
    if data.startswith(b"\xff\xd8"):
        pixels, scans = _jpeg(name, data)
        most = max(SCANS_AT_FULL_SIZE * max_pixels // max(pixels, 1), 1)
        if scans > min(most, MAX_SCANS):
            most = min(most, MAX_SCANS)
            raise ValueError(
                f"{name}: expected a JPEG of at most {most} scans, got {scans}: save it as a baseline JPEG"
            )
        return pixels * max(scans, 1)
    if data.startswith(_PNG):
        return _png(name, data)
    return 0


def _jpeg(name: str, data: bytes) -> tuple[int, int]:
    """Pixels and scans. The latter at most: what looks like a scan's beginning, wherever it is."""
    at, pixels, exif = 2, 0, b""
    for _ in range(MAX_PARTS):
        if at + 4 > len(data):
            break
        kind = data[at + 1]
        if data[at] != 0xFF or kind == 0xFF:
            # Filling, or nonsense that Pillow skips.
            at += 1
            continue
        if kind == _SCAN:
            break
        if kind not in _SEGMENTS:
            raise ValueError(f"{name}: expected segments and a scan in the JPEG, got marker ff{kind:02x} at byte {at}")
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if kind in _FRAMES and len(body) >= 5:
            height, width = struct.unpack_from(">HH", body, 1)
            pixels = max(pixels, height * width)
        if kind == 0xE1 and body.startswith(_EXIF):
            # Pillow puts those of several segments together.
            exif += body[len(_EXIF) :]
        if kind == 0xE2 and body.startswith(_PREVIEWS):
            _check_exif(name, body[len(_PREVIEWS) :])
        at += 2 + max(length, 2)
    else:
        raise ValueError(f"{name}: expected at most {MAX_PARTS} segments before the JPEG's first scan, got more")
    if at > MAX_HEADER_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_HEADER_BYTES} bytes before the JPEG's first scan, got {at}")
    _check_exif(name, exif)
    return pixels, data.count(b"\xff\xda")


def _png(name: str, data: bytes) -> int:
    """Pixels."""
    at, pixels = len(_PNG), 0
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            return pixels
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if kind == b"IHDR" and body + 8 <= len(data):
            width, height = struct.unpack_from(">II", data, body)
            pixels = max(pixels, width * height)
        elif kind == b"eXIf":
            _check_exif(name, data[body : body + length])
        elif kind in _TEXTS and data.startswith(b"Raw profile type", body):
            # EXIF as text, packed: what it holds cannot be told without unpacking it.
            raise ValueError(
                f"{name}: expected a PNG whose EXIF is a chunk of its own, got it as text: save it without"
            )
        at = body + length + 4
    raise ValueError(f"{name}: expected at most {MAX_CHUNKS} chunks in the PNG, got more: save it anew")


def _check_exif(name: str, exif: bytes) -> None:
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    if len(exif) > MAX_EXIF_BYTES:
        raise ValueError(f"{name}: expected at most {MAX_EXIF_BYTES} bytes of EXIF, got {len(exif)}: save it without")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None or len(exif) < 16:
        return
    is_big = struct.unpack_from(f"{order}H", exif, 2) == (43,)
    (at,) = struct.unpack_from(f"{order}{'Q' if is_big else 'I'}", exif, 8 if is_big else 4)
    entry_count = struct.Struct(f"{order}{'Q' if is_big else 'H'}")
    if at + entry_count.size > len(exif):
        return
    (entries,) = entry_count.unpack_from(exif, at)
    if entries > MAX_EXIF_ENTRIES:
        raise ValueError(f"{name}: expected at most {MAX_EXIF_ENTRIES} entries of EXIF, got {entries}: save it without")
