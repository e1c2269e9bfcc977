"""Bytes to values and back; nothing that comes over a network breaks the reader."""

from __future__ import annotations

import struct
import tracemalloc

import msgpack
import numpy as np
import pytest
from openpi_client import msgpack_numpy

from xr0_engine.serve.wire import MAX_ITEMS, pack, unpack

ARRAYS = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "empty": np.zeros((0, 32), np.float32),
    "no dimensions": np.array(1.5),
    "turned": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[::-1, ::2],
    "columns first": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.arange(3, dtype=">i4"),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize(
    ("write", "read"),
    [
        pytest.param(pack, unpack, id="ours"),
        pytest.param(msgpack_numpy.packb, unpack, id="from openpi"),
        pytest.param(pack, msgpack_numpy.unpackb, id="to openpi"),
    ],
)
def test_arrays_survive(array, write, read):
    result = read(write({"value": array}))["value"]
    assert (result.dtype, result.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(result, array)


def test_plain_values_and_scalars_survive():
    message = {"text": "pick", "none": None, "flag": True, "list": [1, 2.5, {"a": b"x"}], "scalar": np.float32(0.5)}
    result = unpack(pack(message))
    assert result == message
    assert isinstance(result["scalar"], np.float32)


def array_map(**changed: object) -> bytes:
    fields = {"__ndarray__": True, "data": bytes(8), "dtype": "<f4", "shape": [2], **changed}
    return msgpack.packb({name.encode(): value for name, value in fields.items()})


MALFORMED = {
    "nothing": b"",
    "text": b"hello there",
    "half a message": pack({"image": ARRAYS["image"]})[:-5],
    "two messages": pack({}) + pack({}),
    "reserved byte": b"\xc1",
    "deep nesting": b"\x91" * 100_000,
    "4 billion items": b"\xdd\xff\xff\xff\xff",
    "4 billion entries": b"\xdf\xff\xff\xff\xff",
    "4 GB of data": b"\xc6\xff\xff\xff\xff",
    "number as key": msgpack.packb({1: 2}),
    "broken text": b"\xa2\xff\xff",
    "extension": msgpack.packb(msgpack.ExtType(5, b"x")),
    "many items": msgpack.packb([[[]] * 1000] * 1000),
    "no dtype": array_map(dtype=None),
    "object dtype": array_map(dtype="|O"),
    "structured dtype": array_map(dtype="i4,i4"),
    "text dtype": array_map(dtype="<U2"),
    "unknown dtype": array_map(dtype="zz"),
    "too little data": array_map(data=bytes(4)),
    "too much data": array_map(data=bytes(12)),
    "data no bytes": array_map(data="12345678"),
    "negative size": array_map(shape=[-2]),
    "overflowing shape": array_map(shape=[2**30, 2**30, 2**30, 16]),
    "sizes that multiply to 0": array_map(data=b"", shape=[2**40, 0]),
    "size no number": array_map(shape=["2"]),
    "no shape": array_map(shape=None),
    "ten dimensions": array_map(shape=[1] * 9 + [2]),
    "scalar of text": msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}),
    "scalar too large": msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_message_is_refused(data):
    with pytest.raises(ValueError, match="message: expected msgpack"):
        unpack(data)


def test_small_items_cannot_take_large_memory():
    # 16 MB of empty lists would take 900 MB of objects.
    block = struct.pack(">BH", 0xDC, 1000) + b"\x90" * 1000
    data = (struct.pack(">BH", 0xDC, 1000) + block * 1000) * 16
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"more than {MAX_ITEMS} items"):
        unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    "value", [np.array(["text"]), np.array([1j]), np.array([object()])], ids=lambda v: str(v.dtype)
)
def test_arrays_of_no_numbers_are_not_sent(value):
    with pytest.raises(ValueError, match="expected arrays of numbers"):
        pack({"value": value})


def test_objects_are_not_sent():
    with pytest.raises(TypeError, match="expected plain values and arrays, got set"):
        pack({"value": {1}})
