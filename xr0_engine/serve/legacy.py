"""The released TCP protocol (spec section 6), for clients that cannot be changed: off unless asked for.

4 bytes of big-endian length, then a pickle: of a dictionary one way, of a tensor (1, T, 32) float32 the other. The
protocol knows no errors: a request that is refused ends the connection, and the log says why. It knows no keys either:
whoever reaches the port is served.

Pickles run code by design. These never do: the reader knows a few opcodes, and in place of every class or function that
a pickle names it has a stand-in that stores plain data, which is checked before anything is made of it.
"""

from __future__ import annotations

import asyncio
import io
import logging
import pickle
import pickletools
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from xr0_engine.serve import protocol
from xr0_engine.serve.protocol import Busy, PolicyFailed, PolicyMetadata, Refused, Request
from xr0_engine.serve.service import Service
from xr0_engine.serve.wire import MAX_DIMENSIONS, make_array
from xr0_engine.types import ActionChunk

log = logging.getLogger("xr0_engine.serve")

DEFAULT_LEGACY_PORT = 10086
MAX_OPCODES = 20_000
"""A request takes some hundred; state as a list of numbers a few more."""

IDLE_S = 600.0
"""How long a connection may be silent, and how long a message may take."""

_FIELDS = ("task_id", "state", "base", "wrist_left", "language", "seed")
_VIEWS = {"base": "base", "wrist_left": "left_wrist"}


class _StandIn:
    """Stores how it was made (args) and what state it was given, as plain data."""

    # On the class too: objects may be made without __init__.
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_StandIn):
    """numpy.ndarray through `_reconstruct`; state: (version, shape, dtype, Fortran order, bytes)."""


class _Buffer(_StandIn):
    """numpy.ndarray through `_frombuffer`; args: (bytes, dtype, shape, order)."""


class _Scalar(_StandIn):
    """numpy scalar; args: (dtype, bytes)."""


class _Dtype(_StandIn):
    """numpy.dtype; args: (name, ...); state: (version, byte order, ...)."""


class _Picture(_StandIn):
    """PIL.Image.Image and its subclasses; state: [info, mode, size, palette, bytes, ...]."""


class _Name(_StandIn):
    """A class that is only named as an argument, such as numpy.ndarray in `_reconstruct`; never made."""


_CORES = ("numpy.core", "numpy._core")
_ADMITTED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "ndarray"): _Name,
    ("numpy", "dtype"): _Dtype,
    **{(f"{core}.multiarray", "_reconstruct"): _Array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _Scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _Buffer for core in _CORES},
    ("PIL.Image", "Image"): _Picture,
    ("PIL.PngImagePlugin", "PngImageFile"): _Picture,
    ("PIL.JpegImagePlugin", "JpegImageFile"): _Picture,
}

# Everything a dictionary of arrays, pictures and plain values needs, in protocols 3 to 5.
_NAMES = """
    PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
    BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD
"""
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes if opcode.name in _NAMES.split()}

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
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return _ADMITTED[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("persistent objects are not admitted")


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
    """The value of a pickle made of plain values, lists, tuples, dictionaries, NumPy arrays and PIL images.

    Images become (H, W, 3) uint8 RGB. Only a dictionary's own values are looked into, not lists within. Raises
    ValueError for anything else, before anything it names was looked up.
    """
    try:
        _check_opcodes(data)
        value = _Reader(io.BytesIO(data)).load()
        if isinstance(value, dict):
            return {key: _make(item, max_pixels) for key, item in value.items()}
        return _make(value, max_pixels)
    except _NONSENSE as error:
        raise ValueError(f"pickle: expected plain values, arrays and images: {error}") from None


def read_request(fields: object, metadata: PolicyMetadata) -> Request:
    """The released client's dictionary as a request. Raises ValueError that names the field."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"request: expected a dictionary, got {type(fields).__name__}")
    unknown = [key for key in fields if key not in _FIELDS]
    if unknown:
        raise ValueError(f"{unknown[0]!r:.80}: unknown field; expected {', '.join(_FIELDS)}")
    task = fields.get("task_id")
    state = fields.get("state")
    if isinstance(state, np.ndarray) and state.ndim == 3 and len(state) == 1:
        state = state[0]
    known = {
        # Some clients number their tasks: then the server has to serve one robot type alone.
        "robot_type": task if isinstance(task, str) and task in metadata.robots else None,
        "state": state,
        "prompt": fields.get("language"),
        "seed": fields.get("seed"),
        "images": {view: fields[key] for key, view in _VIEWS.items() if fields.get(key) is not None},
    }
    return protocol.read_request({name: value for name, value in known.items() if value is not None}, metadata)


def encode_reply(chunk: ActionChunk) -> bytes:
    """A pickled float32 tensor (1, T, A) on the CPU, which any torch can read, whichever wrote it."""
    # The released client expects a tensor, so this protocol alone needs torch on the server.
    import torch

    return pickle.dumps(torch.from_numpy(np.array(chunk.actions, np.float32)[None]), protocol=4)


async def serve_legacy(service: Service, host: str, port: int) -> asyncio.Server:
    """Listen for released clients. Raises OSError if the port cannot be had."""
    return await asyncio.start_server(lambda reader, writer: _handle(service, reader, writer), host, port)


async def _handle(service: Service, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    address = "{}:{} (legacy)".format(*writer.get_extra_info("peername")[:2])
    number = service.admit(address)
    if number is None:
        writer.close()
        return
    try:
        await _serve(service, number, reader, writer)
    except (Refused, Busy, PolicyFailed) as error:
        service.monitor.refused(number, error.kind)
        log.warning("%s: %s", address, error)
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError):
        pass
    finally:
        service.release(number)
        writer.close()


async def _serve(service: Service, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Request, reply, request, until something is wrong. Raises Refused, Busy or PolicyFailed for what the protocol has
    no words for."""
    metadata = await service.ready()
    while True:
        data = await _receive(reader, service.config.max_message_bytes)
        received = time.perf_counter()
        if service.draining:
            raise Busy("the server is shutting down")
        service.busy.add(number)
        try:
            request = await asyncio.to_thread(_read, data, metadata)
            async with service.turns:
                queue_ms = 1e3 * (time.perf_counter() - received)
                chunk, infer_ms = await service.infer(request)
            reply = encode_reply(chunk)
            total_ms = 1e3 * (time.perf_counter() - received)
            timing = {"infer_ms": infer_ms, "queue_ms": queue_ms, "total_ms": total_ms}
            writer.write(struct.pack(">I", len(reply)) + reply)
            await asyncio.wait_for(writer.drain(), IDLE_S)
            service.monitor.answered(number, request.observation, chunk, timing)
        finally:
            service.busy.discard(number)


async def _receive(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    (length,) = struct.unpack(">I", await asyncio.wait_for(reader.readexactly(4), IDLE_S))
    if length > max_bytes:
        raise Refused(f"message: expected at most {max_bytes} bytes, got {length}")
    # What was announced is not allocated: the buffer grows with what comes.
    return await asyncio.wait_for(reader.readexactly(length), IDLE_S)


def _read(data: bytes, metadata: PolicyMetadata) -> Request:
    try:
        return read_request(restricted_loads(data, metadata.max_image_pixels), metadata)
    except ValueError as error:
        raise Refused(str(error)) from None
    except RecursionError:
        raise Refused("request: expected plain values, got lists nested too deeply") from None


def _check_opcodes(data: bytes) -> None:
    """Also that every length a pickle announces is there, before the machine allocates it. Raises one of _NONSENSE."""
    stream = io.BytesIO(data)
    for _ in range(MAX_OPCODES):
        opcode = _OPCODES.get(stream.read(1))
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


def _make(item: object, max_pixels: int) -> Any:
    if isinstance(item, _Picture):
        return _make_picture(item, max_pixels)
    if isinstance(item, _Array | _Buffer | _Scalar):
        return _make_array(item)
    if isinstance(item, _StandIn | type):
        raise ValueError("pickle: expected values, got something that is only part of one")
    return item


def _make_array(item: _Array | _Buffer | _Scalar) -> np.ndarray | np.generic:
    if isinstance(item, _Scalar):
        dtype, data = item.args
        return make_array(data, _dtype_name(dtype), [])[()]
    if isinstance(item, _Buffer):
        data, dtype, shape, order = item.args
        fortran = order == "F"
    else:
        _, shape, dtype, fortran, data = item.state
    if isinstance(data, bytearray):
        data = bytes(data)
    array = make_array(data, _dtype_name(dtype), shape)
    return array.reshape(array.shape[::-1]).T if fortran else array


def _dtype_name(item: object) -> str:
    """'<f4' from what NumPy writes: its name without byte order, then the order."""
    if not isinstance(item, _Dtype) or not item.args:
        raise ValueError("array: expected a dtype as NumPy writes it")
    order = "|" if item.state is None else item.state[1]
    return f"{order}{item.args[0]}"


def _make_picture(item: _Picture, max_pixels: int) -> np.ndarray:
    _, mode, size, _, data = item.state[:5]
    bands = {"L": 1, "RGB": 3, "RGBA": 4}.get(str(mode))
    if bands is None:
        raise ValueError(f"image: expected mode L, RGB or RGBA, got {mode!r:.80}")
    width, height = size
    pixels = make_array(data, "|u1", [height, width, bands])
    if not 0 < width * height <= max_pixels:
        raise ValueError(f"image: expected at most {max_pixels} pixels, got {width} x {height}")
    return np.asarray(Image.fromarray(pixels.squeeze(2) if bands == 1 else pixels).convert("RGB"))
