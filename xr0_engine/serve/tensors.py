"""A CPU tensor as torch pickles it, to an array: no torch, and nothing run. The pickles within are read elsewhere."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from xr0_engine.serve.wire import MAX_DIMENSIONS, make_array

HEAD = 5
"""Pickles before the bytes of a storage: a magic number, a version, the machine, the storage, its key."""

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_BFLOAT16 = "BFloat16Storage"
STORAGES = {
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    # NumPy has no bfloat16: it is the upper half of a float32.
    _BFLOAT16: "<u2",
    "DoubleStorage": "<f8",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "BoolStorage": "|b1",
    "ByteStorage": "|u1",
}
"""torch's storages -> NumPy's names of their elements."""


def storage_array(head: Sequence[Any], data: bytes) -> np.ndarray:
    """The elements of a storage, (N,) read-only; bfloat16 as float32.

    head: the values of the HEAD pickles, the storage as its persistent tuple with its name in place of its class. data:
    what comes after them. Raises ValueError for what torch does not write.
    """
    magic, version, machine, storage, keys = head
    if magic != _MAGIC or version != _VERSION or machine["little_endian"] is not True:
        raise ValueError("tensor: expected a storage as torch saves it on a little-endian machine")
    kind, name, key, place, count, *views = storage
    if kind != "storage" or name not in STORAGES or keys != [key] or views not in ([], [None]):
        raise ValueError("tensor: expected one plain storage as torch saves it")
    if place != "cpu":
        raise ValueError(f"tensor: expected one on the CPU (`tensor.cpu()`), got {place!r:.40}")
    (length,) = struct.unpack_from("<q", data)
    if length != count:
        raise ValueError(f"tensor: expected {count!r:.40} elements, got {length}")
    elements = make_array(data[8:], STORAGES[name], [length])
    if name != _BFLOAT16:
        return elements
    widened: np.ndarray = (elements.astype("<u4") << 16).view("<f4")
    return widened


def strided(storage: np.ndarray, offset: object, shape: Any, strides: Any) -> np.ndarray:
    """The tensor within its storage, in C order. Raises ValueError unless all of it lies there, in no more elements."""
    if not all(map(_is_count, (offset, *shape, *strides))) or not len(shape) == len(strides) <= MAX_DIMENSIONS:
        raise ValueError(f"tensor: expected an offset, shape and strides of at most {MAX_DIMENSIONS} dimensions")
    # More elements than are stored would be memory out of nothing.
    if math.prod(shape) > len(storage):
        raise ValueError(f"tensor: expected at most the {len(storage)} elements of its storage, got shape {shape}")
    if math.prod(shape) == 0:
        return np.empty(shape, storage.dtype)
    last = offset + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if last >= len(storage):
        raise ValueError(f"tensor: expected the {len(storage)} elements of its storage, got number {last}")
    steps = [step * storage.itemsize for step in strides]
    tensor = np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
    return tensor if tensor.flags.c_contiguous else tensor.copy()


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40
