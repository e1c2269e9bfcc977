"""Clients of `xr0 serve`, blocking and asyncio. They import no torch: `pip install xr0-engine` on the robot is enough.

Both reconnect by themselves, in the background and with growing pauses; until then `infer` raises ConnectionError at
once, so that whoever executes chunks goes on with what it has.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import websockets.asyncio.client
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from xr0_engine.serve.protocol import (
    PolicyMetadata,
    Refused,
    Reply,
    Request,
    decode_metadata,
    decode_reply,
    encode_request,
)
from xr0_engine.types import ActionChunk, Observation

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
KEEPALIVE_S = 5.0
CLOSE_S = 1.0
SHORTEST_TRY_S = 0.01
MAX_REPLY_BYTES = 16 << 20


class _Connecting:
    """What both clients share: where to connect, what to send, how to read the answer."""

    def __init__(
        self, url: str, api_key: str | None, timeout_s: float, jpeg_quality: int | None, ca_file: str | Path | None
    ) -> None:
        self.url = url if "://" in url else f"ws://{url}"
        if not self.url.startswith(("ws://", "wss://")):
            raise ValueError(f"url: expected ws://host:port or wss://host:port, got {url!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
            raise ValueError(f"jpeg_quality: expected 1 to 95, got {jpeg_quality!r}")
        self.timeout_s = timeout_s
        self._jpeg_quality = jpeg_quality
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._tls = _tls(self.url, ca_file)
        self._metadata: PolicyMetadata | None = None
        self._numbers = 0
        _keep_freed_memory()
        self._lost: Exception = ConnectionError(f"{self.url}: not connected yet")

    @property
    def metadata(self) -> PolicyMetadata:
        """What the server serves. Raises ConnectionError before the first connection."""
        if self._metadata is None:
            raise ConnectionError(f"{self.url}: not connected yet")
        return self._metadata

    def _settings(self, timeout_s: float) -> dict[str, Any]:
        return {
            "uri": self.url,
            "additional_headers": self._headers,
            "compression": None,
            # Robots talk to a server in their own network, whatever the environment says of proxies.
            "proxy": None,
            "open_timeout": timeout_s,
            "ping_interval": KEEPALIVE_S,
            "ping_timeout": KEEPALIVE_S,
            "close_timeout": CLOSE_S,
            "max_size": MAX_REPLY_BYTES,
            "ssl": self._tls,
        }

    def _cannot_connect(self, error: Exception) -> Exception:
        """What the caller is told: ConnectionError if it is worth another try."""
        if isinstance(error, InvalidURI):
            return ValueError(f"url: expected ws://host:port, got {self.url!r}: {error}")
        if isinstance(error, InvalidStatus):
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace")
            kind = PermissionError if status in (401, 403) else ConnectionError
            return kind(f"{self.url}: HTTP {status}: {body}")
        return ConnectionError(f"{self.url}: cannot connect: {str(error) or type(error).__name__}")

    def _greeted(self, greeting: str | bytes) -> None:
        """Raises ValueError if the server speaks another protocol, or serves something else than it did."""
        metadata = decode_metadata(greeting if isinstance(greeting, bytes) else greeting.encode())
        if self._metadata is not None and metadata != self._metadata:
            raise ValueError(f"{self.url}: the server came back with another policy; make a new client for it")
        self._metadata = metadata

    def _not_connected(self) -> Exception:
        if isinstance(self._lost, PermissionError):
            return PermissionError(str(self._lost))
        return ConnectionError(str(self._lost))

    def _request(self, observation: Observation, prefix: np.ndarray | None, seed: int | None) -> tuple[int, bytes]:
        """The number of the next request, and the request."""
        self._numbers += 1
        message = encode_request(Request(observation, prefix, seed, self._numbers), self._jpeg_quality)
        if len(message) > self.metadata.max_message_bytes:
            raise Refused(f"message: expected at most {self.metadata.max_message_bytes} bytes, got {len(message)}")
        return self._numbers, message


def _tls(url: str, ca_file: str | Path | None) -> ssl.SSLContext | None:
    if not url.startswith("wss://"):
        if ca_file is not None:
            raise ValueError(f"ca_file: expected a wss:// url beside it, got {url}")
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ValueError(f"ca_file: expected certificates in PEM, got {ca_file}: {error}") from None


def _keep_freed_memory() -> None:
    """Have glibc keep freed blocks as large as a message.

    It gives them back to the kernel until it has seen one so large freed, and every message then pays for its memory
    anew: two images of 256x256 with 257 page faults, up to a fifth of what a robot waits beyond inference. This block
    itself costs nothing: nobody touches it.
    """
    bytes(31 << 20)


def _chunk(reply: Reply, start: float) -> ActionChunk:
    """start: when the request was begun, by perf_counter. Raises the reply's error, if it holds one."""
    if reply.error is not None:
        raise reply.error
    assert reply.chunk is not None
    round_trip_ms = 1e3 * (time.perf_counter() - start)
    return replace(reply.chunk, timing_ms={**reply.chunk.timing_ms, "round_trip": round_trip_ms})


class Client(_Connecting):
    """The blocking client: connects on creation. Close it, or use it as a context manager.

    url: ws://host:port or wss://host:port; without a scheme, ws. timeout_s: how long `infer` waits for a reply, and the
    constructor for the server, its warm-up included. jpeg_quality: 1 to 95 sends images as JPEG, None as they are.
    ca_file: certificates to trust, for wss with a certificate of one's own. Threads may share it; their calls take
    turns. Raises ConnectionError if the server does not come, PermissionError if it refuses the API key, ValueError for
    a wrong argument.
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
        self._turn = threading.Lock()
        self._closed = threading.Event()
        self._connection: websockets.sync.client.ClientConnection | None = None
        deadline = time.monotonic() + timeout_s
        for pause_s in _pauses():
            try:
                self._connection = self._open(max(deadline - time.monotonic(), SHORTEST_TRY_S))
                return
            except ConnectionError:
                if time.monotonic() + pause_s > deadline:
                    raise
                time.sleep(pause_s)

    @property
    def connected(self) -> bool:
        """Whether the next infer has a connection to go over, as far as is known."""
        return self._connection is not None

    def infer(self, observation: Observation, prefix: np.ndarray | None = None, seed: int | None = None) -> ActionChunk:
        """The next chunk; its timing_ms also tells `queue` (waiting its turn), `server` and `round_trip`.

        prefix: (P, A) robot units in the frame of this observation, P within the metadata's prefix_range. Raises
        ConnectionError if there is no connection or it is lost, without waiting for the next; Refused (a ValueError)
        for a wrong request; Busy or PolicyFailed (both RuntimeErrors) as the server says.
        """
        with self._turn:
            connection = self._connection
            if connection is None:
                raise self._not_connected()
            start = time.perf_counter()
            number, message = self._request(observation, prefix, seed)
            try:
                connection.send(message)
                reply = decode_reply(connection.recv(self.timeout_s))
                if reply.id != number:
                    raise ValueError(f"expected the reply to request {number}, got {reply}")
            except TimeoutError:
                # A server that hangs is as good as none.
                self._lose(connection, f"no reply within {self.timeout_s:g} s")
                raise self._not_connected() from None
            except (ConnectionClosed, ValueError) as error:
                self._lose(connection, f"connection lost: {error}")
                raise self._not_connected() from None
        return _chunk(reply, start)

    def close(self) -> None:
        """Close the connection and stop reconnecting; a call that waits raises ConnectionError."""
        self._closed.set()
        self._lost = ConnectionError(f"{self.url}: the client is closed")
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, timeout_s: float) -> websockets.sync.client.ClientConnection:
        """Connected, and greeted by the server. Raises ConnectionError, PermissionError or ValueError."""
        try:
            # Entered, as its library asks for, and left when it is closed.
            connection = websockets.sync.client.connect(**self._settings(timeout_s)).__enter__()
        except (OSError, InvalidHandshake, InvalidURI) as error:
            raise self._cannot_connect(error) from None
        try:
            self._greeted(connection.recv(timeout_s))
        except (ConnectionClosed, TimeoutError) as error:
            _drop(connection)
            raise ConnectionError(f"{self.url}: no greeting: {str(error) or type(error).__name__}") from None
        except ValueError:
            connection.close()
            raise
        return connection

    def _lose(self, connection: websockets.sync.client.ClientConnection, reason: str) -> None:
        _drop(connection)
        if self._closed.is_set():
            return
        self._connection = None
        self._lost = ConnectionError(f"{self.url}: {reason}")
        threading.Thread(target=self._reconnect, name="xr0-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        for pause_s in _pauses():
            if self._closed.wait(pause_s):
                return
            try:
                connection = self._open(self.timeout_s)
            except ConnectionError as error:
                self._lost = error
            except (PermissionError, ValueError) as error:
                self._lost = error
                return
            else:
                self._connection = connection
                if self._closed.is_set():
                    self.close()
                return


def _drop(connection: websockets.sync.client.ClientConnection) -> None:
    """Closing in order would wait for a server that does not answer."""
    with suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)
    connection.close()


class AsyncClient(_Connecting):
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
        self._awaited: dict[int, asyncio.Future[Reply]] = {}
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
        for pause_s in _pauses():
            try:
                self._connection = await self._open(max(deadline - time.monotonic(), SHORTEST_TRY_S))
                break
            except ConnectionError:
                if time.monotonic() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
        assert self._connection is not None
        self._keeper = asyncio.create_task(self._keep(self._connection))

    async def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, seed: int | None = None
    ) -> ActionChunk:
        """As Client.infer. Also raises Superseded if a later call overtook this one."""
        connection = self._connection
        if connection is None:
            raise self._not_connected()
        start = time.perf_counter()
        number, message = self._request(observation, prefix, seed)
        return _chunk(await self._exchange(connection, number, message), start)

    async def close(self) -> None:
        """Close the connection and stop reconnecting."""
        self._lost = ConnectionError(f"{self.url}: the client is closed")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

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
            await connection.send(message)
            return await asyncio.wait_for(reply, self.timeout_s)
        except ConnectionClosed as error:
            raise ConnectionError(f"{self.url}: connection lost: {error}") from None
        except asyncio.TimeoutError:
            # A server that hangs is as good as none. Closing in order would wait for it.
            connection.transport.abort()
            raise ConnectionError(f"{self.url}: no reply within {self.timeout_s:g} s") from None
        finally:
            del self._awaited[number]

    async def _open(self, timeout_s: float) -> websockets.asyncio.client.ClientConnection:
        """Connected, and greeted by the server. Raises ConnectionError, PermissionError or ValueError."""
        try:
            connection = await websockets.asyncio.client.connect(**self._settings(timeout_s))
        except (OSError, asyncio.TimeoutError, InvalidHandshake, InvalidURI) as error:
            raise self._cannot_connect(error) from None
        try:
            self._greeted(await asyncio.wait_for(connection.recv(), timeout_s))
        except (ConnectionClosed, asyncio.TimeoutError) as error:
            connection.transport.abort()
            raise ConnectionError(f"{self.url}: no greeting: {str(error) or type(error).__name__}") from None
        except ValueError:
            connection.transport.abort()
            raise
        return connection

    async def _keep(self, connection: websockets.asyncio.client.ClientConnection) -> None:
        """Read replies until the connection is lost, then get the next, until closed or told to stay away."""
        while True:
            try:
                await self._read(connection)
            finally:
                self._connection = None
                self._fail_awaited()
            for pause_s in _pauses():
                await asyncio.sleep(pause_s)
                try:
                    self._connection = connection = await self._open(self.timeout_s)
                    break
                except ConnectionError as error:
                    self._lost = error
                except (PermissionError, ValueError) as error:
                    self._lost = error
                    return

    async def _read(self, connection: websockets.asyncio.client.ClientConnection) -> None:
        try:
            async with connection:
                async for message in connection:
                    reply = decode_reply(message)
                    awaited = self._awaited.get(reply.id or 0)
                    if awaited is not None and not awaited.done():
                        awaited.set_result(reply)
            self._lost = ConnectionError(f"{self.url}: the server closed the connection: {connection.close_reason}")
        except (ConnectionClosed, ValueError) as error:
            self._lost = ConnectionError(f"{self.url}: connection lost: {error}")

    def _fail_awaited(self) -> None:
        for awaited in self._awaited.values():
            if not awaited.done():
                awaited.set_exception(ConnectionError(str(self._lost)))


def _pauses() -> Iterator[float]:
    """Seconds between attempts: doubling, and spread so that many clients do not come back in step."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
