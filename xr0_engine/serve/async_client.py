"""The asyncio client of `xr0 serve`: Client, for programs with an event loop."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import TracebackType

import numpy as np
import websockets.asyncio.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from xr0_engine.serve.connecting import CLOSE_S, SHORTEST_TRY_S, Connecting, after, chunk_of, pauses
from xr0_engine.serve.protocol import Reply, decode_reply
from xr0_engine.types import ActionChunk, Guide, Observation


class AsyncClient(Connecting):
    """The asyncio client, for use within one event loop: `async with AsyncClient(url) as client`.

    Arguments as in Client. Calls may overlap: of those that wait for their turn on the server, the newest wins.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = 10.0,
        jpeg_quality: int | None = None,
        ca_file: str | Path | None = None,
    ) -> None:
        super().__init__(url, api_key, timeout_s, jpeg_quality, ca_file)
        self._connection: websockets.asyncio.client.ClientConnection | None = None
        self._awaited: dict[int, asyncio.Future[tuple[Reply, bytes | str]]] = {}
        self._keeper: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        """Whether the next infer has a connection to go over."""
        return self._connection is not None

    async def connect(self) -> None:
        """Wait for the server, at most timeout_s, its warm-up included.

        Raises ConnectionError if it does not come, PermissionError if it refuses the API key.
        """
        deadline = time.monotonic() + self.timeout_s
        for pause_s in pauses():
            try:
                self._connection = await self._open(max(deadline - time.monotonic(), SHORTEST_TRY_S))
                break
            except (ConnectionError, PermissionError, ValueError) as error:
                self._note(error)
                if not isinstance(error, ConnectionError) or time.monotonic() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
        assert self._connection is not None
        self._keeper = asyncio.create_task(self._keep(self._connection))

    async def infer(
        self,
        observation: Observation,
        prefix: np.ndarray | None = None,
        seed: int | None = None,
        guide: Guide | None = None,
    ) -> ActionChunk:
        """As Client.infer. Also raises Superseded if a later call overtook this one."""
        connection = self._connection
        if connection is None:
            raise self._not_connected()
        start = time.perf_counter()
        number, message = self._request(observation, prefix, seed, guide)
        return chunk_of(await self._exchange(connection, number, message), start)

    async def close(self) -> None:
        """Close the connection and stop reconnecting; calls that wait raise ConnectionError. Takes 2 s at most."""
        self._lost = ConnectionError(f"{self.url}: the client is closed")
        connection, self._connection = self._connection, None
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper], timeout=2 * CLOSE_S)
        if connection is not None:
            connection.transport.abort()

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _exchange(
        self, connection: websockets.asyncio.client.ClientConnection, number: int, message: bytes
    ) -> Reply:
        self._awaited[number] = reply = asyncio.get_running_loop().create_future()
        try:
            return await asyncio.wait_for(self._send(connection, message, reply), self.timeout_s)
        except ConnectionClosed as error:
            raise ConnectionError(f"{self.url}: connection lost: {error}") from None
        except ValueError as error:
            lost = ConnectionError(f"{self.url}: connection lost: {error}")
            self._lose(connection, lost)
            connection.transport.abort()
            raise lost from None
        except asyncio.TimeoutError:
            # A server that hangs is as good as none. Closing in order would wait for it.
            lost = ConnectionError(f"{self.url}: no reply within {self.timeout_s:g} s")
            self._lose(connection, lost)
            connection.transport.abort()
            raise lost from None
        finally:
            del self._awaited[number]
            # What it was told while the message was still being sent, asyncio would print as missed.
            if reply.done() and not reply.cancelled():
                reply.exception()

    async def _send(
        self,
        connection: websockets.asyncio.client.ClientConnection,
        message: bytes,
        answer: asyncio.Future[tuple[Reply, bytes | str]],
    ) -> Reply:
        """Raises ConnectionClosed, or ValueError for a reply that does not fit to what was sent."""
        await connection.send(message)
        reply, content = await answer
        self._check(reply, content, message)
        return reply

    async def _open(self, timeout_s: float) -> websockets.asyncio.client.ClientConnection:
        """Connected, and greeted by the server. Raises ConnectionError, PermissionError or ValueError."""
        deadline = time.monotonic() + timeout_s
        try:
            connection = await websockets.asyncio.client.connect(**self._settings(timeout_s))
        except (OSError, EOFError, RuntimeError, asyncio.TimeoutError, WebSocketException) as error:
            raise self._cannot_connect(error) from None
        is_greeted = False
        try:
            left_s = max(deadline - time.monotonic(), SHORTEST_TRY_S)
            self._greeted(await asyncio.wait_for(connection.recv(), left_s))
            is_greeted = True
        except (ConnectionClosed, asyncio.TimeoutError) as error:
            raise ConnectionError(f"{self.url}: no greeting: {str(error) or type(error).__name__}") from None
        finally:
            if not is_greeted:
                connection.transport.abort()
        return connection

    async def _keep(self, connection: websockets.asyncio.client.ClientConnection) -> None:
        """Read replies until the connection is lost, then get the next, until closed."""
        while True:
            try:
                await self._read(connection)
            finally:
                self._connection = None
                self._fail_awaited()
            for pause_s in pauses():
                await asyncio.sleep(after(self._lost, pause_s))
                try:
                    self._connection = connection = await self._open(self.timeout_s)
                    break
                except (ConnectionError, PermissionError, ValueError) as error:
                    self._note(error)

    async def _read(self, connection: websockets.asyncio.client.ClientConnection) -> None:
        try:
            async with connection:
                async for message in connection:
                    reply = decode_reply(message)
                    awaited = self._awaited.get(reply.id or 0)
                    if awaited is not None and not awaited.done():
                        awaited.set_result((reply, message))
            reason = f"the server closed the connection: {connection.close_reason}"
        except (ConnectionClosed, ValueError) as error:
            reason = f"connection lost: {error}"
        self._lose(connection, ConnectionError(f"{self.url}: {reason}"))

    def _lose(self, connection: websockets.asyncio.client.ClientConnection, error: ConnectionError) -> None:
        """The first to notice says why."""
        if self._connection is connection:
            self._connection = None
            self._note(error)

    def _fail_awaited(self) -> None:
        for awaited in self._awaited.values():
            if not awaited.done():
                awaited.set_exception(ConnectionError(str(self._lost)))
