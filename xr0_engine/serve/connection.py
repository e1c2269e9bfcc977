"""One client of the server: its requests read, kept until their turn, and answered."""

from __future__ import annotations

import asyncio
import time
import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from xr0_engine.serve.decoding import Allowance, DecodeAllowance
from xr0_engine.serve.protocol import (
    Busy,
    PolicyFailed,
    PolicyMetadata,
    Refused,
    Request,
    ServerError,
    Superseded,
    encode_chunk,
    encode_error,
    exchanged,
    request_id,
)
from xr0_engine.serve.requests import decoded_pixels, read_fields, read_request
from xr0_engine.serve.service import Service
from xr0_engine.types import ActionChunk

READ_SHARE = 0.2
"""Seconds of the event loop per second that a client may take to have its messages read; a camera's frames take a
hundredth. What is beyond is read later, not refused."""
READ_BURST_S = 0.2


@dataclass(frozen=True)
class _Waiting:
    """exchanged: CRC-32 of what was said so far, for the reply's digest."""

    request: Request
    received: float
    exchanged: int


class ClientConnection:
    """One client: a reader that keeps its newest request, and an answerer that takes it when its turn comes."""

    def __init__(
        self, service: Service, connection: ServerConnection, metadata: PolicyMetadata, greeting: bytes, number: int
    ) -> None:
        self._service = service
        self._connection = connection
        self._metadata = metadata
        self._greeting = zlib.crc32(greeting)
        self._number = number
        self._waiting: _Waiting | None = None
        self._arrived = asyncio.Event()
        rate = metadata.max_requests_per_s
        # As many at once as one second brings.
        self._requests = Allowance(rate, max(rate, 1.0))
        self._reading = Allowance(READ_SHARE, READ_BURST_S)
        self._decoding = DecodeAllowance()

    async def run(self) -> None:
        """Until the connection is closed. Raises ConnectionClosed unless it was closed in order."""
        # Reading waits while a picture is decoded; that the client has gone shows all the same, and drops it.
        gone = asyncio.create_task(self._connection.wait_closed())
        tasks = [asyncio.create_task(self._answer()), asyncio.create_task(self._read()), gone]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        faults = [task.exception() for task in tasks if not task.cancelled()]
        for fault in sorted(filter(None, faults), key=lambda fault: isinstance(fault, ConnectionClosed)):
            raise fault

    async def _read(self) -> None:
        # Errors are sent from here, so that a client that does not read its replies is not read from either.
        async for message in self._connection:
            received = time.perf_counter()
            number = None
            allowed = self._requests.spend(1)
            try:
                with self._reading:
                    fields = read_fields(message)
                    number = request_id(fields)
                    if why := self._why_not(allowed):
                        raise Busy(why)
                    pixels = decoded_pixels(fields, self._metadata.max_image_pixels)
                    request = None if pixels else read_request(fields, self._metadata)
                if request is None:
                    request = await self._decode(fields, pixels)
            except Busy as error:
                await self._refuse(error, number)
            except ValueError as error:
                await self._refuse(Refused(str(error)), number)
            else:
                assert isinstance(message, bytes)
                old, self._waiting = self._waiting, _Waiting(request, received, exchanged(self._greeting, message))
                self._service.busy.add(self._number)
                self._arrived.set()
                if old is not None:
                    await self._refuse(Superseded("a newer observation took its place"), old.request.id)
            # Neither reading nor sending need wait, so a flood of messages would keep the loop from everyone else; what
            # is beyond the allowances is read no faster than they come.
            await asyncio.sleep(max(self._reading.debt_s, 0 if allowed else 1 / self._metadata.max_requests_per_s))

    async def _answer(self) -> None:
        while True:
            await self._arrived.wait()
            outcome: tuple[ActionChunk, float] | ServerError
            async with self._service.turns:
                # Only now: what came while others had their turn is newer.
                waiting = self._take()
                queue_ms = 1e3 * (time.perf_counter() - waiting.received)
                try:
                    outcome = await self._service.infer(waiting.request)
                except (Refused, PolicyFailed) as error:
                    outcome = error
            if isinstance(outcome, tuple):
                await self._reply(waiting, *outcome, queue_ms)
            else:
                await self._refuse(outcome, waiting.request.id)
            if self._waiting is None:
                self._service.busy.discard(self._number)

    def _take(self) -> _Waiting:
        waiting, self._waiting = self._waiting, None
        assert waiting is not None
        self._arrived.clear()
        return waiting

    async def _reply(self, waiting: _Waiting, chunk: ActionChunk, infer_ms: float, queue_ms: float) -> None:
        total_ms = 1e3 * (time.perf_counter() - waiting.received)
        timing = {"infer_ms": infer_ms, "queue_ms": queue_ms, "total_ms": total_ms}
        request = waiting.request
        # Clients that count replies are openpi's, which look for no digest.
        before = None if request.id is None else waiting.exchanged
        await self._connection.send(encode_chunk(chunk, request.id, timing, request.columns, before))
        # The robot waits for the chunk, nobody for the metrics.
        self._service.answered(self._number, request, chunk, timing)

    async def _refuse(self, error: ServerError, number: int | None) -> None:
        self._service.monitor.refused(self._number, error.kind)
        await self._connection.send(encode_error(error, number))

    async def _decode(self, fields: dict[str, Any], pixels: int) -> Request:
        if why := self._decoding.why_not(pixels):
            raise Busy(why)
        return await self._service.decoder.run(partial(read_request, fields, self._metadata), pixels, self._decoding)

    def _why_not(self, allowed: bool) -> str | None:
        if self._service.draining:
            return "the server is shutting down"
        if not allowed:
            return f"expected at most {self._metadata.max_requests_per_s:g} requests per second"
        return None
