"""What a picture file costs to decode, told from its structure before anything is decoded.

Pixels alone do not tell: a progressive JPEG walks the whole picture once per scan, and a scan takes a hundred bytes;
Pillow steps through a file's parts in Python, and a part takes a few bytes; its EXIF directory may name the same bytes
thousands of times. All of it is counted, and refused beyond what cameras and encoders write.
"""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

MAX_SCANS = 32
"""Of a JPEG. Encoders make 10 of a picture in colour, 18 of one in CMYK."""

SCANS_AT_FULL_SIZE = 12
"""Of a JPEG of as many pixels as are taken: half a second on one core for 4 Mi. A smaller one may have more."""

MAX_PARTS = 512
"""Segments and fill bytes before a JPEG's first scan, and segments after it. Colour profiles take a few, 255 at the
very most; encoders write up to three a scan."""

MAX_HEADER_BYTES = 4 << 20
"""Before a JPEG's first scan: a colour profile, EXIF, a phone's depth map."""

MAX_CHUNKS = 2048
"""Of a PNG or WebP. libpng writes 8 KiB each, so 4 Mi pixels of noise take 1,600; larger pictures may have more."""

CHUNK_BYTES = 4096
"""Of a PNG on average, beyond the first MAX_CHUNKS: what an encoder writes that writes small ones."""

MAX_EXIF_BYTES = 1 << 16
MAX_EXIF_ENTRIES = 512
"""Of an EXIF directory. Cameras write some twenty; each may stand for as many bytes as there are."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SCAN, _END = 0xDA, 0xD9
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
# Before the first scan, each with its length: frames, tables, restart interval, APPn, comments. What has no length
# (restarts, extensions) does not belong there, and readers disagree about it.
_SEGMENTS = {*range(0xC0, 0xD0), 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE} - {0xC8}
# After it there may be a number of lines too.
_LATER_SEGMENTS = {*_SEGMENTS, _SCAN, 0xDC}
# Within a scan 00 and restarts follow on ff, and more of ff.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_EXIF, _PREVIEWS = b"Exif\0\0", b"MPF\0"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Of TIFF's types, in bytes; 0 is none.
_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)


class PictureError(ValueError):
    """A picture that is refused: what was expected, what came, and the remedy. Whoever knows its name adds that."""


def decoding_cost(data: bytes, max_pixels: int) -> int:
    """Pixels that decoding a JPEG or PNG file walks over: its own, times its scans. 0 for what is no such file.

    max_pixels: of the largest that is taken. Raises PictureError for a JPEG, PNG, WebP or TIFF file that takes more
    than its size lets expect; one that is too large or broken is for those who decode it to refuse.
    """
    if data.startswith(b"\xff\xd8"):
        pixels, scans = _jpeg(data)
        most = min(max(SCANS_AT_FULL_SIZE * max_pixels // max(pixels, 1), 1), MAX_SCANS)
        if scans > most:
            raise PictureError(f"expected a JPEG of at most {most} scans, got {scans}: save it as a baseline JPEG")
        return pixels * max(scans, 1)
    if data.startswith(_PNG):
        return _png(data)
    if data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
        _check_webp(data)
    if data.startswith(_TIFFS):
        _check_tiff(data)
    return 0


def _jpeg(data: bytes) -> tuple[int, int]:
    """Pixels and scans, as far as libjpeg reads; what comes behind, such as previews and films, is not decoded."""
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
            raise PictureError(f"expected segments and a scan in the JPEG, got marker ff{kind:02x} at byte {at}")
        (length,) = struct.unpack_from(">H", data, at + 2)
        body = data[at + 4 : at + 2 + length]
        if kind in _FRAMES and len(body) >= 5:
            height, width = struct.unpack_from(">HH", body, 1)
            pixels = max(pixels, height * width)
        if kind == 0xE1 and body.startswith(_EXIF):
            # Pillow puts those of several segments together.
            exif += body[len(_EXIF) :]
        if kind == 0xE2 and body.startswith(_PREVIEWS):
            _check_exif(body[len(_PREVIEWS) :])
        at += 2 + max(length, 2)
    else:
        raise PictureError(f"expected at most {MAX_PARTS} segments before the JPEG's first scan, got more")
    if at > MAX_HEADER_BYTES:
        raise PictureError(f"expected at most {MAX_HEADER_BYTES} bytes before the JPEG's first scan, got {at}")
    _check_exif(exif)
    return pixels, _scans(data, at)


def _scans(data: bytes, at: int) -> int:
    """From the first one's marker to the end of the picture, by the markers between them as libjpeg reads them. Those
    with a length are skipped by it: what looks like an end may stand within."""
    scans = others = 0
    while (found := _MARKER.search(data, at)) is not None:
        at, kind = found.end(), data[found.end() - 1]
        if kind == _END:
            break
        if kind == _SCAN:
            scans += 1
            if scans > MAX_SCANS:
                return scans + data.count(b"\xff\xda", at)
        else:
            others += 1
            if others > MAX_PARTS:
                raise PictureError(f"expected at most {MAX_PARTS} segments after the JPEG's first scan, got more")
        if kind in _LATER_SEGMENTS and at + 2 <= len(data):
            at += max(struct.unpack_from(">H", data, at)[0], 2)
    return scans


def _png(data: bytes) -> int:
    """Pixels."""
    at, pixels = len(_PNG), 0
    most = max(MAX_CHUNKS, len(data) // CHUNK_BYTES)
    for _ in range(most):
        if at + 12 > len(data):
            return pixels
        length, kind = struct.unpack_from(">I4s", data, at)
        body = at + 8
        if kind == b"IHDR" and body + 8 <= len(data):
            width, height = struct.unpack_from(">II", data, body)
            pixels = max(pixels, width * height)
        elif kind == b"eXIf":
            _check_exif(data[body : body + length])
        elif kind in _TEXTS and data.startswith(b"Raw profile type", body):
            # EXIF as text, packed: what it holds cannot be told without unpacking it.
            raise PictureError("expected a PNG whose EXIF is a chunk of its own, got it as text: save it without")
        at = body + length + 4
    raise PictureError(f"expected at most {most} chunks in the PNG, got more: save it anew")


def _check_webp(data: bytes) -> None:
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            _check_exif(data[at + 8 : at + 8 + length])
        at += 8 + length + length % 2
    raise PictureError(f"expected at most {MAX_CHUNKS} chunks in the WebP, got more: save it anew")


class _Directory(NamedTuple):
    """Where the first directory of TIFF data has its entries, how many, and how each begins: tag, type, count."""

    at: int
    entries: int
    entry: struct.Struct
    entry_bytes: int


def _directory(data: bytes) -> _Directory | None:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        return None
    is_big = struct.unpack_from(f"{order}H", data, 2) == (43,)
    word, size = ("Q", 20) if is_big else ("I", 12)
    (at,) = struct.unpack_from(f"{order}{word}", data, 8 if is_big else 4)
    count = struct.Struct(f"{order}{'Q' if is_big else 'H'}")
    if at + count.size > len(data):
        return None
    (entries,) = count.unpack_from(data, at)
    return _Directory(at + count.size, entries, struct.Struct(f"{order}HH{word}"), size)


def _check_exif(exif: bytes) -> None:
    while exif.startswith(_EXIF):
        exif = exif[len(_EXIF) :]
    if len(exif) > MAX_EXIF_BYTES:
        raise PictureError(f"expected at most {MAX_EXIF_BYTES} bytes of EXIF, got {len(exif)}: save it without")
    found = _directory(exif)
    if found is not None and found.entries > MAX_EXIF_ENTRIES:
        raise PictureError(f"expected at most {MAX_EXIF_ENTRIES} entries of EXIF, got {found.entries}: save it without")


def _check_tiff(data: bytes) -> None:
    """Of its first picture: several are refused by those who decode it."""
    found = _directory(data)
    if found is None:
        return
    if found.entries > MAX_EXIF_ENTRIES:
        raise PictureError(
            f"expected at most {MAX_EXIF_ENTRIES} entries in the TIFF, got {found.entries}: save it anew"
        )
    named = 0
    for number in range(found.entries):
        at = found.at + number * found.entry_bytes
        if at + found.entry_bytes > len(data):
            return
        _, kind, count = found.entry.unpack_from(data, at)
        named += count * (_TYPE_BYTES[kind] if kind < len(_TYPE_BYTES) else 0)
    if named > len(data):
        raise PictureError(
            f"expected a TIFF whose entries name less than its {len(data)} bytes, got {named}: save it anew"
        )
