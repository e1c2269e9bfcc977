"""The released TCP protocol (spec section 6), for clients that cannot be changed: off unless asked for.

4 bytes of big-endian length, then a pickle: of a dictionary one way, of a tensor (1, T, 32) float32 the other. The
protocol knows no errors: a request that is refused ends the connection, and the log says why. It knows no keys either:
whoever reaches the port is served.

What a request may hold is released.py's, how its pickle is read unpickle.py's.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import struct
import time

import numpy as np

from xr0_engine.serve.protocol import Busy, PolicyFailed, PolicyMetadata, Refused, Request
from xr0_engine.serve.released import read_request
from xr0_engine.serve.service import Service
from xr0_engine.serve.unpickle import restricted_loads
from xr0_engine.types import ActionChunk

log = logging.getLogger("xr0_engine.serve")

DEFAULT_LEGACY_PORT = 10086
IDLE_S = 600.0
"""How long a connection may be silent, and how long a message may take."""


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
