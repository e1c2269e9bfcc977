"""Pickles read without running anything: plain values, NumPy arrays, PIL images and CPU tensors, and nothing else.

Pickles run code by design. These never do: the reader knows a few opcodes, and in place of every class or function that
a pickle names it has a stand-in that stores plain data, which is checked before anything is made of it.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from xr0_engine.serve.tensors import HEAD, STORAGES, storage_array, strided
from xr0_engine.serve.wire import MAX_DIMENSIONS, make_array

MAX_OPCODES = 20_000
"""A request takes some hundred; state as a list of numbers a few more."""


class _StandIn:
    """Stores how it was made (args) and what state it was given, as plain data; made: what it stands for, made once."""

    # On the class too: objects may be made without __init__.
    args: tuple[Any, ...] = ()
    state: Any = None
    made: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_StandIn):
    """numpy.ndarray through `_reconstruct`; state: (version, shape, dtype, Fortran order, bytes)."""


class _Buffer(_StandIn):
    """numpy.ndarray through `_frombuffer`; args: (bytes, dtype, shape, order), and the axes' places for order K."""


class _Scalar(_StandIn):
    """numpy scalar; args: (dtype, bytes)."""


class _Dtype(_StandIn):
    """numpy.dtype; args: (name, ...); state: (version, byte order, ...)."""


class _Picture(_StandIn):
    """PIL.Image.Image and its subclasses, one for each file format; state: [info, mode, size, palette, bytes, ...]."""


class _Tensor(_StandIn):
    """torch.Tensor through `_rebuild_tensor_v2`; args: (storage, offset, shape, strides, gradient, hooks, more)."""


class _Storage(_StandIn):
    """A tensor's storage through `_load_from_bytes`; args: (what torch.save wrote,)."""


class _Features(_StandIn):
    """transformers' BatchFeature and its like, dictionaries in classes of their own; state: {"data": dictionary}."""


class _Name(_StandIn):
    """What is only part of something else, such as numpy.ndarray in `_reconstruct`."""


class _Ordered(dict[Any, Any]):
    """collections.OrderedDict: a tensor's hooks, of which it has none, or a request."""

    def __init__(self) -> None:
        super().__init__()


class _Bytes(_StandIn):
    """Bytes in protocol 2, which has no opcode for them; args: (text, "latin1") of `_codecs.encode`, () of `bytes`."""


class _Limits:
    """max_pixels: of an image. bytes_left: that may still be copied; a pickle has no use for more than it holds."""

    def __init__(self, max_pixels: int, bytes_left: int) -> None:
        self.max_pixels = max_pixels
        self.bytes_left = bytes_left

    def spend(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise ValueError("the same bytes in more than one place")


_CORES = ("numpy.core", "numpy._core")
_ADMITTED: dict[tuple[str, str], type[_StandIn | _Ordered]] = {
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Dtype,
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _Scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _Buffer for core in _CORES},
    ("PIL.Image", "Image"): _Picture,
    # In what a picture's file says beside its pixels.
    ("PIL.PngImagePlugin", "iTXt"): _Name,
    ("PIL.TiffImagePlugin", "IFDRational"): _Name,
    ("fractions", "Fraction"): _Name,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _Storage,
    ("collections", "OrderedDict"): _Ordered,
    ("collections", "UserDict"): _Features,
    ("transformers.feature_extraction_utils", "BatchFeature"): _Features,
    ("transformers.tokenization_utils_base", "BatchEncoding"): _Features,
    ("tokenizers", "Encoding"): _Name,
    ("__builtin__", "bytes"): _Bytes,
    ("_codecs", "encode"): _Bytes,
}
_PICTURE_FILE = re.compile(r"PIL\.[A-Za-z0-9]+ImagePlugin [A-Za-z0-9]+ImageFile")

# Everything a dictionary of arrays, pictures, tensors and plain values needs, in protocols 2 to 5.
_NAMES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
# And what the pickles of a tensor's storage need, in protocol 2.
_STORAGE_NAMES = """
    PROTO STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINUNICODE EMPTY_LIST APPEND APPENDS TUPLE
    TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT GLOBAL BINPERSID
"""


def _opcodes(names: str) -> dict[bytes, pickletools.OpcodeInfo]:
    chosen = names.split()
    return {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in chosen}


_OPCODES, _STORAGE_OPCODES = _opcodes(_NAMES), _opcodes(_STORAGE_NAMES)

# What the pickle machine raises when a program makes no sense to it, or to a stand-in.
_NONSENSE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    AssertionError,
    RecursionError,
    struct.error,
)


# The one written in Python: the one in C takes memory for whatever index a memo opcode names.
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if _PICTURE_FILE.fullmatch(f"{module} {name}"):
            return _Picture
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("persistent objects are not admitted")


class _StorageReader(pickle._Unpickler):
    """Of the pickles in a storage: its class is its name, and the persistent object the tuple that names it."""

    def find_class(self, module: str, name: str) -> Any:
        if module != "torch" or name not in STORAGES:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return name

    def persistent_load(self, pid: object) -> Any:
        return pid


def _recall(load: Callable[[Any], None]) -> Callable[[Any], None]:
    """A memo opcode that gives no containers a second time. NumPy and Pillow share names, texts and small shapes; a
    list of twice a list of twice a list ... is a few bytes that unfold without end wherever they are looked at."""

    def recall(reader: Any) -> None:
        load(reader)
        value = reader.stack[-1]
        is_shape = isinstance(value, tuple) and len(value) <= MAX_DIMENSIONS and all(map(_is_single, value))
        if not is_shape and not _is_single(value):
            raise pickle.UnpicklingError(f"one {type(value).__name__} in two places")

    return recall


def _is_single(value: object) -> bool:
    return not isinstance(value, list | tuple | dict)


def _build(reader: Any) -> None:
    # Anything but a stand-in could be changed by its state: the classes themselves, for all later requests.
    if not isinstance(reader.stack[-2], _StandIn):
        raise pickle.UnpicklingError(f"state for a {type(reader.stack[-2]).__name__}")
    state = reader.stack.pop()
    reader.stack[-1].__setstate__(state)


_Reader.dispatch = {
    **pickle._Unpickler.dispatch,
    pickle.BUILD[0]: _build,
    **{opcode: _recall(pickle._Unpickler.dispatch[opcode]) for opcode in (pickle.BINGET[0], pickle.LONG_BINGET[0])},
}


def restricted_loads(data: bytes, max_pixels: int) -> Any:
    """The value of a pickle made of plain values, lists, tuples, dictionaries, NumPy arrays, PIL images and tensors.

    Images become uint8 arrays of their bands: (H, W, 3) RGB, (H, W, 4) with alpha, (H, W) grey. Tensors become arrays,
    bfloat16 as float32. A dictionary's values and the lists in it are looked into, not dictionaries within. Raises
    ValueError for anything else, before anything it names was looked up.
    """
    limits = _Limits(max_pixels, len(data))
    try:
        value = _load(io.BytesIO(data), _Reader, _OPCODES)
        if isinstance(value, _Features):
            value = _dictionary(value)
        if isinstance(value, dict):
            return {key: _make_value(key, item, limits) for key, item in value.items()}
        return _make(value, limits)
    except _NONSENSE as error:
        raise ValueError(f"pickle: expected plain values, arrays, images and tensors: {error}") from None


def _load(stream: io.BytesIO, reader: type[pickle._Unpickler], opcodes: Mapping[bytes, pickletools.OpcodeInfo]) -> Any:
    """The value of the stream's next pickle. Raises one of _NONSENSE."""
    start = stream.tell()
    _check_opcodes(stream, opcodes)
    stream.seek(start)
    return reader(stream).load()


def _check_opcodes(stream: io.BytesIO, opcodes: Mapping[bytes, pickletools.OpcodeInfo]) -> None:
    """Also that every length a pickle announces is there, before the machine allocates it. Raises one of _NONSENSE."""
    for _ in range(MAX_OPCODES):
        opcode = opcodes.get(stream.read(1))
        if opcode is None:
            raise ValueError("opcode not admitted")
        if opcode.name == "STOP":
            return
        if opcode.name == "GLOBAL":
            # Two lines. The library's own reader looks for escapes in them, which the machine does not.
            stream.readline()
            stream.readline()
        elif opcode.arg is not None:
            opcode.arg.reader(stream)
    raise ValueError(f"more than {MAX_OPCODES} opcodes")


def _dictionary(item: _Features) -> dict[Any, Any]:
    data = item.state.get("data") if isinstance(item.state, Mapping) else None
    if not isinstance(data, dict):
        raise ValueError("BatchFeature, BatchEncoding: expected their data as a dictionary")
    return data


def _make_value(key: object, item: object, limits: _Limits) -> Any:
    try:
        return _make(item, limits)
    except _NONSENSE as error:
        raise ValueError(f"{key!r:.80}: {error}") from None


def _make(item: object, limits: _Limits) -> Any:
    if isinstance(item, list | tuple):
        return type(item)(_make(inner, limits) for inner in item)
    if isinstance(item, _StandIn):
        if item.made is None:
            item.made = _make_stood_for(item, limits)
        return item.made
    if isinstance(item, type):
        raise ValueError(_ONLY_PART)
    return item


_ONLY_PART = "expected values, got something that is only part of one"


def _make_stood_for(item: _StandIn, limits: _Limits) -> Any:
    if isinstance(item, _Picture):
        return _make_picture(item, limits)
    if isinstance(item, _Array | _Buffer | _Scalar):
        return _make_array(item, limits)
    if isinstance(item, _Tensor):
        return _make_tensor(item, limits)
    if isinstance(item, _Bytes):
        return _make_bytes(item, limits)
    raise ValueError(_ONLY_PART)


def _make_bytes(item: object, limits: _Limits) -> object:
    """Bytes of those that a pickle holds in another form; all else as it is."""
    if isinstance(item, bytearray):
        limits.spend(len(item))
        return bytes(item)
    if not isinstance(item, _Bytes):
        return item
    text, encoding = item.args or ("", "latin1")
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError(f"bytes: expected text in latin1, got {type(text).__name__} in {encoding!r:.40}")
    limits.spend(len(text))
    return text.encode("latin1")


def _make_array(item: _Array | _Buffer | _Scalar, limits: _Limits) -> np.ndarray | np.generic | str:
    if isinstance(item, _Scalar):
        dtype, data = item.args
        name, data = _dtype_name(dtype), _make_bytes(data, limits)
        # A text taken out of an array of texts.
        if name.startswith("<U") and isinstance(data, bytes):
            return data.decode("utf-32-le").rstrip("\0")
        return make_array(data, name, [])[()]
    if isinstance(item, _Buffer):
        data, dtype, shape, order, *axes = item.args
    else:
        _, shape, dtype, fortran, data = item.state
        order, axes = "F" if fortran else "C", []
    array = make_array(_make_bytes(data, limits), _dtype_name(dtype), shape)
    if order == "K" and len(axes) == 1:
        # The shape is that of the memory, whose axes the array has in another order.
        return array.transpose(*axes)
    if order not in ("C", "F"):
        raise ValueError(f"array: expected order C or F, got {order!r:.40}")
    return array.reshape(array.shape[::-1]).T if order == "F" else array


def _dtype_name(item: object) -> str:
    """'<f4' from what NumPy writes: its name without byte order, then the order."""
    if not isinstance(item, _Dtype) or not item.args:
        raise ValueError("array: expected a dtype as NumPy writes it")
    order = "|" if item.state is None else item.state[1]
    return f"{order}{item.args[0]}"


def _make_picture(item: _Picture, limits: _Limits) -> np.ndarray:
    info, mode, size, _, data = item.state[:5]
    bands = {"L": 1, "RGB": 3, "RGBA": 4}.get(str(mode))
    if bands is None:
        # Pillow cuts off what is above 255 where it makes RGB of more bits.
        remedy = ": send `image.convert('RGB')`" if mode in ("P", "CMYK", "YCbCr", "LAB", "HSV") else ""
        raise ValueError(f"image: expected mode RGB, got {mode!r:.80}{remedy}")
    # One colour of it may stand for what is not there.
    if not isinstance(info.get("transparency"), str | _Name | None):
        raise ValueError("image: expected a picture without transparency: lay it on a background")
    width, height = size
    pixels = make_array(_make_bytes(data, limits), "|u1", [height, width, bands])
    if not 0 < width * height <= limits.max_pixels:
        raise ValueError(f"image: expected at most {limits.max_pixels} pixels, got {width} x {height}")
    return pixels[..., 0] if bands == 1 else pixels


def _make_tensor(item: _Tensor, limits: _Limits) -> np.ndarray:
    storage, offset, shape, strides, _, _, *more = item.args
    if not isinstance(storage, _Storage) or any(more):
        raise ValueError("tensor: expected a plain one as torch pickles it")
    (data,) = storage.args
    data = _make_bytes(data, limits)
    if not isinstance(data, bytes):
        raise ValueError(f"tensor: expected its storage as bytes, got {type(data).__name__}")
    # Once: what _make_bytes copied was counted there.
    if data is storage.args[0]:
        limits.spend(len(data))
    stream = io.BytesIO(data)
    head = [_load(stream, _StorageReader, _STORAGE_OPCODES) for _ in range(HEAD)]
    return strided(storage_array(head, data[stream.tell() :]), offset, shape, strides)
