"""Archives of arrays: what NumPy writes is read as it was, and nothing else takes memory or time."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from xr0_engine.serve.npz import Field, directory, read, write

MOST = 1 << 20
ANY = Field("fiub", (0, 3), MOST)
FIELDS = {"a": ANY, "b": ANY, "text": Field("U", (0, 0), 1 << 10), "small": Field("f", (1, 2), 1 << 10)}


def loaded(data: bytes):
    return read(data, directory(data, FIELDS, MOST), FIELDS)


class Pipe(io.RawIOBase):
    """What cannot be sought in, as a socket's file: sizes then stand behind the bytes."""

    def __init__(self) -> None:
        self.data = b""

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.data += bytes(data)
        return len(data)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("file", [io.BytesIO, Pipe])
def test_what_numpy_writes_is_read(save, file):
    arrays = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "b": np.asfortranarray(np.arange(6, dtype=">i8").reshape(2, 3)),
        "text": np.array("Öffne die Tür"),
        "small": np.zeros((0, 4)),
    }
    written = file()
    save(written, **arrays)
    found = loaded(written.data if isinstance(written, Pipe) else written.getvalue())
    assert found.pop("text") == "Öffne die Tür"
    for name, array in found.items():
        np.testing.assert_array_equal(array, arrays[name])
        assert array.dtype == arrays[name].dtype


def test_numpy_reads_what_is_written():
    with np.load(io.BytesIO(write(actions=np.ones((1, 2, 3), np.float32))), allow_pickle=False) as reply:
        np.testing.assert_array_equal(reply["actions"], np.ones((1, 2, 3)))


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def zipped(members, **options) -> bytes:
    """members: (name, bytes) each."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as made:
        for name, content in members:
            made.writestr(zipfile.ZipInfo(name), content, options.get("compression"))
    return file.getvalue()


def said(data: bytes, offset: int, value: int, size: int = 4) -> bytes:
    """With another number in the only entry of its directory."""
    at = data.rindex(b"PK\x01\x02") + offset
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


DEFLATED = {"compression": zipfile.ZIP_DEFLATED}
ONE = npy(np.arange(6.0))
PLAIN = zipped([("a.npy", ONE)])
PACKED = zipped([("a.npy", ONE)], **DEFLATED)
TWO = zipped([("a.npy", ONE), ("b.npy", ONE)])
ZEROS = zipped([("a.npy", npy(np.zeros(8 << 20)))], **DEFLATED)
SHAPE_OF_A_TERABYTE = ONE.replace(b"(6,), }          ", b"(137438953472,), }")
HEAD_OF_64_KIB = b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 16) + b" " * (1 << 16)
BOMBS = {
    "zeros": (ZEROS, "a: expected at most 1048576 bytes, got 67108992"),
    "zeros that say they are few": (said(ZEROS, 24, len(ONE)), "a: expected .* bytes for shape"),
    "zeros under the head of a few": (
        said(zipped([("a.npy", ONE + bytes(1 << 26))], **DEFLATED), 24, len(ONE)),
        "a: expected 176 bytes, got others",
    ),
    "many in all": (
        zipped([(f"{name}.npy", npy(np.zeros(80_000))) for name in "ab"], **DEFLATED),
        "npz: expected at most 1048576 bytes unpacked, got 1280256",
    ),
    "many members": (zipped([(f"{n}.npy", b"") for n in range(20_000)]), "npz: expected at most 16 members, got 20000"),
    "more than the directory counts": (
        TWO[:-14] + b"\1\0\1\0" + TWO[-10:],
        "npz: expected a directory of 1 members, got more",
    ),
    "twice": (TWO.replace(b"b.npy", b"a.npy"), "npz: expected a once, got it twice"),
    "shape of a terabyte": (zipped([("a.npy", SHAPE_OF_A_TERABYTE)]), "a: expected 1099511627904 bytes for shape"),
    "long head": (
        zipped([("a.npy", HEAD_OF_64_KIB)]),
        "a: expected an array as NumPy saves it, with a head of at most",
    ),
    "long head, deflated": (zipped([("a.npy", HEAD_OF_64_KIB)], **DEFLATED), "with a head of at most 1024 bytes"),
    "objects": (zipped([("a.npy", npy(np.array([{}]), allow_pickle=True))]), "a: expected an array of numbers, got"),
    "pickle for an array": (zipped([("a.npy", b"\x80\x04N.")]), "a: expected an array as NumPy saves it"),
    "structure": (zipped([("a.npy", npy(np.zeros(2, "f4,i4")))]), "a: expected an array of numbers, got"),
    "nested head": (zipped([("a.npy", ONE.replace(b"(6,)", b"((6)"))]), "a: expected an array of numbers, got"),
    "a field's limit": (zipped([("small.npy", npy(np.zeros(300)))]), "small: expected at most 1024 bytes"),
    "dimensions": (zipped([("small.npy", npy(np.array(1.0)))]), "small: expected kind f of 1 to 2 dimensions"),
    "path": (zipped([("../a.npy", ONE)]), "'../a.npy': unknown member; expected a, b, text, small"),
    "no ending": (zipped([("a", ONE)]), "'a': unknown member"),
    "bzip2": (zipped([("a.npy", ONE)], compression=zipfile.ZIP_BZIP2), "a: expected a member stored or deflated"),
    "encrypted": (said(PLAIN, 8, 1, 2), "a: expected a member stored or deflated"),
    "sum": (said(PLAIN, 16, 0), "a: expected its CRC-32"),
    "stored size": (said(PLAIN, 20, 3), "a: expected 176 bytes, as it is stored, got 3"),
    "beyond its end": (said(PACKED, 20, 1 << 30), "a: expected its bytes where the directory says"),
    "elsewhere": (said(PLAIN, 42, 3), "a: expected a member stored or deflated"),
    "outside": (said(PLAIN, 42, 1 << 31), "npz: expected a whole directory"),
    "cut stream": (said(PACKED, 20, 40), "a: expected"),
    "noise for a stream": (PACKED.replace(zlib.compress(ONE)[2:12], b"\xff" * 10), "a: expected a deflated array"),
    "comment": (PLAIN[:-2] + b"\1\0!", "npz: expected an archive that ends with its directory"),
    "something between": (PLAIN[:-22] + b"!" + PLAIN[-22:], "npz: expected an archive that ends"),
    "nothing": (b"", "npz: expected an archive, got 0 bytes"),
    "text that is none": (
        zipped([("text.npy", npy(np.array("ab")).replace(b"a\0\0\0", b"\xff" * 4))]),
        "text: .*utf-32",
    ),
}


@pytest.mark.parametrize(("bomb", "complaint"), BOMBS.values(), ids=BOMBS)
def test_bomb_does_not_go_off(bomb, complaint):
    tracemalloc.start()
    start = time.thread_time()
    with pytest.raises(ValueError, match=complaint):
        loaded(bomb)
    assert time.thread_time() - start < 0.5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MOST
