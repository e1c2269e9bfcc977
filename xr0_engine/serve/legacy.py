"""The released TCP protocols (spec section 6; docs/serving.md), for clients that cannot be changed: off unless asked
for.

4 bytes of big-endian length, then a pickle: of a dictionary one way, of a tensor (1, T, A) float32 the other. Or an
archive of arrays (npz) each way; its first bytes tell. The protocols know no errors: a request that is refused ends the
connection, and the log says why. They know no keys either: whoever reaches the port is served.

What a request may hold is released.py's and released_npz.py's, how its bytes are read unpickle.py's and npz.py's.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import struct
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from xr0_engine.serve import npz, released_npz
from xr0_engine.serve.decoding import DecodeAllowance
from xr0_engine.serve.gate import ACCEPTED_AT_ONCE, Gate
from xr0_engine.serve.protocol import Busy, PolicyFailed, PolicyMetadata, Refused, Request
from xr0_engine.serve.released import read_request
from xr0_engine.serve.service import Service
from xr0_engine.serve.unpickle import restricted_loads
from xr0_engine.types import ActionChunk

log = logging.getLogger("xr0_engine.serve")

DEFAULT_LEGACY_PORT = 10086
IDLE_S = 600.0
"""How long a connection may be silent between messages: evaluations set up their scenes meanwhile."""
MESSAGE_S = 30.0
"""How long a message may take, once it has begun, and a reply: 32 MiB at 9 Mbit/s."""
UNREAD_MESSAGES = 4
"""Messages of the largest size that may be under way together from connections that have not asked for anything yet."""


Read = Callable[[], tuple[Request, released_npz.Reply]]
"""Reads a message: the request, and what its chunk is sent as. Raises ValueError that names the field."""


def reader(data: bytes, metadata: PolicyMetadata, formats: Sequence[str]) -> tuple[Read, int]:
    """How a message is read, and as many pixels as it can hold: they come as they are.

    formats: of ServerConfig. Raises ValueError for a message of none of them, and for an archive that says at once that
    it is no request.
    """
    is_archive = data.startswith(npz.START)
    if "pickle" in formats and not (is_archive and "npz" in formats):
        if is_archive:
            raise ValueError("message: expected a pickle, got an archive (npz): `xr0 serve --legacy-npz` takes these")
        return partial(_read_pickle, data, metadata), max(len(data) // 3, 1)
    if not is_archive:
        raise ValueError(
            f"message: expected {' or '.join(formats)}, got {data[:8]!r}; `xr0 serve --legacy-pickle` takes pickles"
        )
    most = min(metadata.max_message_bytes, released_npz.MAX_ARCHIVE_BYTES)
    members = npz.directory(data, released_npz.FIELDS, most)
    return partial(_read_archive, data, members, metadata), max(sum(member.size for member in members) // 12, 1)


def _read_pickle(data: bytes, metadata: PolicyMetadata) -> tuple[Request, released_npz.Reply]:
    return read_request(restricted_loads(data, metadata.max_image_pixels), metadata), encode_reply


def _read_archive(
    data: bytes, members: list[npz.Member], metadata: PolicyMetadata
) -> tuple[Request, released_npz.Reply]:
    return released_npz.read_request(npz.read(data, members, released_npz.FIELDS), metadata)


def encode_reply(chunk: ActionChunk) -> bytes:
    """A pickled float32 tensor (1, T, A) on the CPU, which any torch can read, whichever wrote it."""
    # The released client expects a tensor, so this protocol alone needs torch on the server.
    import torch

    return pickle.dumps(torch.from_numpy(np.array(chunk.actions, np.float32)[None]), protocol=4)


class LegacyPorts:
    """The ports that the protocol is spoken on."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._gate = Gate(
            longest_s=IDLE_S,
            most_bytes=UNREAD_MESSAGES * service.config.max_message_bytes,
            turned_away=lambda: service.monitor.rejected("too_many_connections"),
        )
        self._servers: list[asyncio.Server] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> None:
        """Raises OSError if the port cannot be had."""
        for listener in self._gate.listen(host, port):
            server = await asyncio.start_server(self._handle, sock=listener, backlog=ACCEPTED_AT_ONCE)
            self._servers.append(server)

    async def close(self) -> None:
        """End all connections."""
        for server in self._servers:
            server.close()
        self._gate.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        connection = _Connection(self._service, self._gate, reader, writer)
        try:
            await connection.run()
        except (Refused, Busy, PolicyFailed) as error:
            connection.failed(error)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError, asyncio.CancelledError):
            # Gone, too slow, or told to go.
            return
        finally:
            connection.close()


class _Connection:
    """One client. It has a place among the clients from its first request on: until then, it is one that waits."""

    def __init__(
        self, service: Service, gate: Gate, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.address = "{}:{} (legacy)".format(*writer.get_extra_info("peername")[:2])
        self._service = service
        self._gate = gate
        self._reader = reader
        self._writer = writer
        self._decoding = DecodeAllowance()
        self._number: int | None = None

    async def run(self) -> None:
        """Request, reply, request, until something is wrong. Raises Refused, Busy or PolicyFailed for what the protocol
        has no words for."""
        metadata = await self._service.ready()
        while True:
            data = await self._receive()
            received = time.perf_counter()
            if self._service.draining:
                raise Busy("the server is shutting down")
            # The protocol has no words for a refusal that passes: whoever sends too much is read later.
            await asyncio.sleep(self._decoding.debt_s)
            read, pixels = self._way_to_read(data, metadata)
            request, encode = await self._service.decoder.run(partial(self._read, read), pixels, self._decoding)
            number = self._admitted()
            self._service.busy.add(number)
            try:
                async with self._service.turns:
                    self._check_there()
                    queue_ms = 1e3 * (time.perf_counter() - received)
                    chunk, infer_ms = await self._service.infer(request)
                reply = encode(chunk)
                total_ms = 1e3 * (time.perf_counter() - received)
                timing = {"infer_ms": infer_ms, "queue_ms": queue_ms, "total_ms": total_ms}
                self._writer.write(struct.pack(">I", len(reply)) + reply)
                await asyncio.wait_for(self._writer.drain(), MESSAGE_S)
                self._service.answered(number, request, chunk, timing)
            finally:
                self._service.busy.discard(number)

    def failed(self, error: Refused | Busy | PolicyFailed) -> None:
        """It ends with that; nobody but the log is told."""
        log.warning("%s: %s", self.address, error)
        if self._number is None:
            self._service.monitor.rejected(error.kind)
        else:
            self._service.monitor.refused(self._number, error.kind)

    def close(self) -> None:
        if self._number is not None:
            self._service.release(self._number)
        # What it does not read is not waited for.
        self._writer.transport.abort()

    async def _receive(self) -> bytes:
        (length,) = struct.unpack(">I", await asyncio.wait_for(self._reader.readexactly(4), IDLE_S))
        most = self._service.config.max_message_bytes
        if length > most:
            raise Refused(f"message: expected at most {most} bytes, got {length}")
        self._gate.weigh(self._writer.transport, length)
        # What was announced is not allocated: the buffer grows with what comes.
        return await asyncio.wait_for(self._reader.readexactly(length), MESSAGE_S)

    def _way_to_read(self, data: bytes, metadata: PolicyMetadata) -> tuple[Read, int]:
        try:
            return reader(data, metadata, self._service.config.legacy_formats)
        except ValueError as error:
            raise Refused(str(error)) from None

    def _read(self, read: Read) -> tuple[Request, released_npz.Reply]:
        """On a thread of the decoder."""
        self._check_there()
        try:
            return read()
        except ValueError as error:
            raise Refused(str(error)) from None
        except RecursionError:
            raise Refused("request: expected plain values, got lists nested too deeply") from None

    def _admitted(self) -> int:
        """Its number. Raises Busy if there is no place for it."""
        if self._number is None:
            self._number = self._service.admit(self.address, released=True)
            if self._number is None:
                raise Busy(self._service.why_full(None, released=True) or "too many clients")
            self._gate.has_passed(self._writer.transport)
        return self._number

    def _check_there(self) -> None:
        """Raises ConnectionError if the client has gone: what it asked for is for nobody."""
        if self._reader.at_eof() or self._reader.exception() is not None:
            raise ConnectionError("the client has gone")
