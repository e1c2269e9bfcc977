"""Messages as bytes: msgpack with NumPy arrays, as openpi's policy protocol has them.

An array travels as the map {b"__ndarray__": True, b"data": raw bytes, b"dtype": "<f4", b"shape": [...]}, a NumPy scalar
as {b"__npgeneric__": True, b"data": number, b"dtype": ...}. Nothing that a message holds can make the reader run code
or take memory out of proportion to the message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

MAX_DIMENSIONS = 4
MAX_LIST_LENGTH = 1024
MAX_MAP_LENGTH = 128
MAX_TEXT_BYTES = 1 << 16
MAX_ITEMS = 1 << 16
"""Items of all lists and maps of a message together: small items take far more memory than bytes on the wire."""

_ARRAY_KINDS = "biuf"


def pack(message: Mapping[str, Any]) -> bytes:
    """A message of plain values, bytes and arrays as bytes; an array's data is copied once.

    Raises ValueError for an array of another kind than numbers or booleans, TypeError for any other object.
    """
    return msgpack.packb(message, default=_pack_array)


def unpack(data: bytes | bytearray | memoryview) -> Any:
    """The inverse of pack. Arrays are read-only views of the message. Raises ValueError for anything malformed."""
    reader = _Reader()
    try:
        return msgpack.unpackb(
            data,
            object_hook=reader.mapping,
            list_hook=reader.sequence,
            max_array_len=MAX_LIST_LENGTH,
            max_map_len=MAX_MAP_LENGTH,
            max_str_len=MAX_TEXT_BYTES,
            max_bin_len=len(data),
            max_ext_len=0,
        )
    # msgpack's own errors are ValueErrors, but for a bare one when maps or lists are nested too deeply.
    except (ValueError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"message: expected msgpack, got {len(data)} bytes that are not: {reason}") from None


def unpack_map(data: bytes | bytearray | memoryview) -> dict[Any, Any]:
    """As unpack. Also raises ValueError for what is no map."""
    return as_map(unpack(data))


def as_map(value: object) -> dict[Any, Any]:
    """The value itself. Raises ValueError if it is no map."""
    if not isinstance(value, dict):
        raise ValueError(f"message: expected a map, got {type(value).__name__}")
    return value


class _Reader:
    """The hooks of one message: what was read so far is counted, arrays are made and checked."""

    def __init__(self) -> None:
        self._items = 0

    def sequence(self, values: list[Any]) -> list[Any]:
        self._count(len(values))
        return values

    def mapping(self, values: dict[Any, Any]) -> Any:
        self._count(len(values))
        if b"__ndarray__" in values:
            return make_array(values.get(b"data"), values.get(b"dtype"), values.get(b"shape"))
        if b"__npgeneric__" in values:
            return _unpack_scalar(values)
        return values

    def _count(self, items: int) -> None:
        self._items += 1 + items
        if self._items > MAX_ITEMS:
            raise ValueError(f"more than {MAX_ITEMS} items in its lists and maps")


def _pack_array(value: object) -> Any:
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    if not isinstance(value, np.ndarray):
        raise TypeError(f"message: expected plain values and arrays, got {type(value).__name__}")
    if value.dtype.kind not in _ARRAY_KINDS:
        raise ValueError(f"message: expected arrays of numbers, got dtype {value.dtype}")
    # A view of the array's own memory: msgpack copies it into the message. An empty view cannot be cast.
    data = np.ascontiguousarray(value).data.cast("B") if value.size else b""
    return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": value.shape}


def make_array(data: object, dtype_name: object, shape: object) -> np.ndarray:
    """A read-only view of the bytes as an array, in C order. Raises ValueError unless they fit dtype and shape."""
    dtype = number_dtype(dtype_name)
    if not isinstance(data, bytes):
        raise ValueError(f"array: expected its data as bytes, got {type(data).__name__}")
    if not isinstance(shape, list | tuple) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise ValueError(f"array: expected a shape of at most {MAX_DIMENSIONS} sizes, got {shape!r:.80}")
    expected = dtype.itemsize
    for size in shape:
        expected *= size
    if len(data) != expected:
        raise ValueError(f"array: expected {expected} bytes for shape {shape} of {dtype}, got {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape)


def _unpack_scalar(values: Mapping[Any, Any]) -> np.generic:
    dtype, data = number_dtype(values.get(b"dtype")), values.get(b"data")
    if not isinstance(data, bool | int | float):
        raise ValueError(f"scalar: expected a number, got {type(data).__name__}")
    try:
        return dtype.type(data)
    except (OverflowError, TypeError) as error:
        raise ValueError(f"scalar: expected a {dtype}, got {data!r:.80}: {error}") from None


def number_dtype(name: object) -> np.dtype[Any]:
    """The dtype of a name such as '<f4'. Raises ValueError if it is none of numbers or booleans."""
    # NumPy would read other names as structures.
    if not isinstance(name, str) or not re.fullmatch("[<>|=]?[biuf][0-9]{1,2}", name):
        raise ValueError(f"array: expected a dtype such as '<f4', got {name!r:.80}")
    try:
        return np.dtype(name)
    except TypeError:
        raise ValueError(f"array: expected a dtype such as '<f4', got {name!r}") from None


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
