"""Archives of arrays as NumPy's savez and savez_compressed write them (.npz), read without trusting them.

Nothing is unpacked before the archive's directory, and nothing of a member beyond its head before that head, says what
is expected: which arrays, of which kinds and how many dimensions, in how many bytes. No array holds Python objects.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from xr0_engine.serve.wire import make_array

MAX_MEMBERS = 16
MAX_HEAD_BYTES = 1024
"""Of a member, before its numbers: NumPy writes 128."""
START = b"PK\x03\x04"
"""Of an archive that has members."""

# The end of a zip file without a comment, an entry of its directory, and what stands before a member's bytes.
_END, _ENTRY, _LOCAL = struct.Struct("<4s4H2LH"), struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_STORED, _DEFLATED = 0, 8
# Hints about deflating (1, 2), sizes repeated behind the bytes (3), the name in UTF-8 (11): nothing that is read here.
_HARMLESS_FLAGS = 0x080E
_MAGIC = b"\x93NUMPY"
_HEAD = re.compile(
    rb"\{'descr': *'([<>|]?[a-zA-Z][0-9]{1,6})', *'fortran_order': *(True|False), *'shape': *\(([0-9, ]*)\),? *\} *\n?"
)

Value = np.ndarray | str


@dataclass(frozen=True)
class Field:
    """What an array of a name may be. kinds: NumPy's letters; U is one text, given as such. dimensions: fewest and
    most. most_bytes: of its member, the head included."""

    kinds: str
    dimensions: tuple[int, int]
    most_bytes: int


@dataclass(frozen=True)
class Member:
    """start, stored: where its bytes lie in the archive, and how many. size, crc: of what they unpack to."""

    name: str
    start: int
    stored: int
    size: int
    crc: int
    is_deflated: bool


def directory(data: bytes, fields: Mapping[str, Field], most_bytes: int) -> list[Member]:
    """What an archive says it holds; nothing is unpacked. most_bytes: of all members together, unpacked.

    Raises ValueError for what is no archive, and for members other than the fields or larger.
    """
    if len(data) < _END.size:
        raise ValueError(f"npz: expected an archive, got {len(data)} bytes")
    signature, disk, first_disk, here, count, size, start, comment = _END.unpack_from(data, len(data) - _END.size)
    if (signature, disk, first_disk, comment) != (b"PK\x05\x06", 0, 0, 0) or start + size != len(data) - _END.size:
        raise ValueError("npz: expected an archive that ends with its directory, as NumPy writes it")
    if here != count or count > MAX_MEMBERS:
        raise ValueError(f"npz: expected at most {MAX_MEMBERS} members, got {count}")
    members: dict[str, Member] = {}
    at = start
    for _ in range(count):
        member, at = _entry(data, at, start, fields)
        if member.name in members:
            raise ValueError(f"npz: expected {member.name} once, got it twice")
        members[member.name] = member
    if at != len(data) - _END.size:
        raise ValueError(f"npz: expected a directory of {count} members, got more")
    total = sum(member.size for member in members.values())
    if total > most_bytes:
        raise ValueError(f"npz: expected at most {most_bytes} bytes unpacked, got {total}")
    return list(members.values())


def read(data: bytes, members: list[Member], fields: Mapping[str, Field]) -> dict[str, Value]:
    """The arrays of directory's members by their names, read-only; a text as such. Raises ValueError for a member that
    is not what the directory says, or not what its field may be."""
    read: dict[str, Value] = {}
    for member in members:
        try:
            read[member.name] = _array(data, member, fields[member.name])
        except zlib.error as error:
            raise ValueError(f"{member.name}: expected a deflated array, got {error}") from None
        except ValueError as error:
            raise ValueError(f"{member.name}: {error}") from None
    return read


def write(**arrays: np.ndarray) -> bytes:
    """An archive of them, for numpy.load."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # Its types take the option allow_pickle for one of them.
    return file.getvalue()


def _entry(data: bytes, at: int, end: int, fields: Mapping[str, Field]) -> tuple[Member, int]:
    """The member that a directory's entry names, and where the next entry begins. end: of the members' bytes."""
    try:
        signature, _, _, flags, method, _, _, crc, stored, size, name_length, extra, comment, _, _, _, local = (
            _ENTRY.unpack_from(data, at)
        )
        written = data[at + _ENTRY.size : at + _ENTRY.size + name_length]
        head, *_, local_name_length, local_extra = _LOCAL.unpack_from(data, local)
    except struct.error:
        raise ValueError("npz: expected a whole directory, got one that is cut") from None
    name = written.decode("ascii", "replace").removesuffix(".npy")
    if name not in fields or written != f"{name}.npy".encode():
        raise ValueError(f"{written!r:.80}: unknown member; expected {', '.join(fields)}, each with .npy behind it")
    if (signature, head) != (b"PK\x01\x02", START) or flags & ~_HARMLESS_FLAGS or method not in (_STORED, _DEFLATED):
        raise ValueError(f"{name}: expected a member stored or deflated, as NumPy writes it")
    named = local + _LOCAL.size + local_name_length
    start = named + local_extra
    if data[local + _LOCAL.size : named] != written or start + stored > end:
        raise ValueError(f"{name}: expected its bytes where the directory says")
    if size > fields[name].most_bytes:
        raise ValueError(f"{name}: expected at most {fields[name].most_bytes} bytes, got {size}")
    if method == _STORED and stored != size:
        raise ValueError(f"{name}: expected {size} bytes, as it is stored, got {stored}")
    return Member(name, start, stored, size, crc, method == _DEFLATED), at + _ENTRY.size + name_length + extra + comment


def _array(data: bytes, member: Member, field: Field) -> Value:
    packed = memoryview(data)[member.start : member.start + member.stored]
    content: bytes | memoryview = packed
    if not member.is_deflated:
        kind, shape, is_transposed, begin = _head(bytes(packed[:MAX_HEAD_BYTES]), member.size, field)
    else:
        unpacking = zlib.decompressobj(-zlib.MAX_WBITS)
        head = unpacking.decompress(packed, MAX_HEAD_BYTES)
        kind, shape, is_transposed, begin = _head(head, member.size, field)
        # One more than it should have, so that what has more does not pass for whole.
        content = head + unpacking.decompress(unpacking.unconsumed_tail, max(member.size - len(head), 0) + 1)
        if len(content) != member.size or not unpacking.eof:
            raise ValueError(f"expected {member.size} bytes, got others")
    if zlib.crc32(content) != member.crc:
        raise ValueError("expected its CRC-32, got another: damaged on its way")
    body = bytes(content[begin:])
    if "U" in kind:
        return body.decode("utf-32-be" if kind[0] == ">" else "utf-32-le").rstrip("\0")
    return make_array(body, kind, shape[::-1]).T if is_transposed else make_array(body, kind, shape)


def _head(head: bytes, size: int, field: Field) -> tuple[str, list[int], bool, int]:
    """What an array's head says: dtype, shape, whether its first axis runs fastest, and where its numbers begin. size:
    of the whole."""
    length_bytes = 2 if head[6:7] == b"\x01" else 4
    begin = 8 + length_bytes + int.from_bytes(head[8 : 8 + length_bytes], "little")
    if head[:6] != _MAGIC or head[6:8] not in (b"\x01\0", b"\x02\0", b"\x03\0") or begin > len(head):
        raise ValueError(f"expected an array as NumPy saves it, with a head of at most {MAX_HEAD_BYTES} bytes")
    said = _HEAD.fullmatch(head[8 + length_bytes : begin])
    if said is None:
        raise ValueError(f"expected an array of numbers, got {head[8 + length_bytes : begin]!r:.120}")
    name, order, sizes = (part.decode("ascii") for part in said.groups())
    shape = [int(part) for part in sizes.split(",") if part.strip()]
    letter, items = re.sub("[^a-zA-Z]", "", name), int(re.sub("[^0-9]", "", name))
    fewest, most = field.dimensions
    if letter not in field.kinds or not fewest <= len(shape) <= most:
        raise ValueError(
            f"expected kind {' or '.join(field.kinds)} of {fewest} to {most} dimensions, got {name!r} of {shape}"
        )
    expected = items * (4 if letter == "U" else 1)
    for side in shape:
        expected *= side
    if begin + expected != size:
        raise ValueError(f"expected {begin + expected} bytes for shape {shape} of {name!r}, got {size}")
    return name, shape, order == "True", begin
