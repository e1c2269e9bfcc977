"""Clients of `xr0 serve`, blocking and asyncio. They import no torch: `pip install xr0-engine` on the robot is enough.

Both reconnect by themselves, in the background and with growing pauses; until then `infer` raises ConnectionError at
once, so that whoever executes chunks goes on with what it has.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
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
MAX_REPLY_BYTES = 16 << 20

_Result = TypeVar("_Result")


class AsyncClient:
    """One connection to a server, for use within one event loop: `async with AsyncClient(url) as client`.

    url: ws://host:port or wss://host:port; without a scheme, ws. timeout_s: how long `infer` waits for a reply, and
    connecting for the server. jpeg_quality: 1 to 95 sends images as JPEG, None as they are. ca_file: certificates to
    trust, for wss with a certificate of one's own.
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
        self._tls = ssl.create_default_context(cafile=ca_file) if self.url.startswith("wss://") else None
        self._metadata: PolicyMetadata | None = None
        self._connection: ClientConnection | None = None
        self._awaited: dict[int, asyncio.Future[Reply]] = {}
        self._numbers = 0
        self._lost: Exception = ConnectionError("not connected yet")
        self._keeper: asyncio.Task[None] | None = None

    @property
    def metadata(self) -> PolicyMetadata:
        """What the server serves. Raises ConnectionError before the first connection."""
        if self._metadata is None:
            raise ConnectionError(f"{self.url}: not connected yet")
        return self._metadata

    @property
    def connected(self) -> bool:
        return self._connection is not None

    async def connect(self) -> None:
        """Wait for the server, at most timeout_s, its warm-up included.

        Raises ConnectionError if it does not come, PermissionError if it refuses the API key.
        """
        deadline = time.monotonic() + self.timeout_s
        for pause_s in _pauses():
            try:
                connection = await self._open(max(deadline - time.monotonic(), 0.01))
                break
            except ConnectionError:
                if time.monotonic() + pause_s > deadline:
                    raise
                await asyncio.sleep(pause_s)
        self._connection = connection
        self._keeper = asyncio.create_task(self._keep(connection))

    async def infer(
        self, observation: Observation, prefix: np.ndarray | None = None, seed: int | None = None
    ) -> ActionChunk:
        """The next chunk; its timing_ms also tells `queue` (waiting its turn), `server` and `round_trip`.

        prefix: (P, A) robot units in the frame of this observation, P within the metadata's prefix_range. Raises
        ConnectionError if there is no connection or it is lost, without waiting for the next; Refused (a ValueError)
        for a wrong request; Superseded if a later call of this client overtook this one; Busy or PolicyFailed (both
        RuntimeErrors) as the server says.
        """
        connection = self._connection
        if connection is None:
            raise self._lost if isinstance(self._lost, PermissionError) else ConnectionError(str(self._lost))
        self._numbers += 1
        number = self._numbers
        start = time.perf_counter()
        message = encode_request(Request(observation, prefix, seed, number), self._jpeg_quality)
        if len(message) > self.metadata.max_message_bytes:
            raise Refused(f"message: expected at most {self.metadata.max_message_bytes} bytes, got {len(message)}")
        reply = await self._exchange(connection, number, message)
        if reply.error is not None:
            raise reply.error
        assert reply.chunk is not None
        timing = {**reply.chunk.timing_ms, "round_trip": 1e3 * (time.perf_counter() - start)}
        return replace(reply.chunk, timing_ms=timing)

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

    async def _exchange(self, connection: ClientConnection, number: int, message: bytes) -> Reply:
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

    async def _open(self, timeout_s: float) -> ClientConnection:
        """Connected, and greeted by the server."""
        try:
            connection = await connect(
                self.url,
                additional_headers=self._headers,
                compression=None,
                # Robots talk to a server in their own network, whatever the environment says of proxies.
                proxy=None,
                open_timeout=timeout_s,
                ping_interval=KEEPALIVE_S,
                ping_timeout=KEEPALIVE_S,
                close_timeout=1.0,
                max_size=MAX_REPLY_BYTES,
                ssl=self._tls,
            )
        except InvalidURI as error:
            raise ValueError(f"url: expected ws://host:port, got {self.url!r}: {error}") from None
        except InvalidStatus as error:
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace")
            kind = PermissionError if status in (401, 403) else ConnectionError
            raise kind(f"{self.url}: HTTP {status}: {body}") from None
        except (OSError, asyncio.TimeoutError, InvalidHandshake) as error:
            raise ConnectionError(f"{self.url}: cannot connect: {error or type(error).__name__}") from None
        try:
            greeting = await asyncio.wait_for(connection.recv(), timeout_s)
            self._take_metadata(decode_metadata(greeting if isinstance(greeting, bytes) else greeting.encode()))
        except (ConnectionClosed, asyncio.TimeoutError) as error:
            connection.transport.abort()
            raise ConnectionError(f"{self.url}: no greeting: {error or type(error).__name__}") from None
        except ValueError:
            connection.transport.abort()
            raise
        return connection

    def _take_metadata(self, metadata: PolicyMetadata) -> None:
        if self._metadata is not None and metadata != self._metadata:
            raise ValueError(f"{self.url}: the server came back with another policy; make a new client for it")
        self._metadata = metadata

    async def _keep(self, connection: ClientConnection) -> None:
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

    async def _read(self, connection: ClientConnection) -> None:
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


class Client:
    """The blocking client: connects on creation, for use from any thread. Close it, or use it as a context manager.

    url: ws://host:port or wss://host:port; without a scheme, ws. timeout_s: how long `infer` waits for a reply, and the
    constructor for the server, its warm-up included. jpeg_quality: 1 to 95 sends images as JPEG, None as they are.
    ca_file: certificates to trust, for wss with a certificate of one's own. Raises ConnectionError if the server does
    not come, PermissionError if it refuses the API key, ValueError for a wrong argument.
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
        self._client = AsyncClient(url, api_key, timeout_s=timeout_s, jpeg_quality=jpeg_quality, ca_file=ca_file)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="xr0-client", daemon=True)
        self._thread.start()
        try:
            self._wait(self._client.connect())
        except BaseException:
            self.close()
            raise

    @property
    def metadata(self) -> PolicyMetadata:
        """What the server serves."""
        return self._client.metadata

    @property
    def connected(self) -> bool:
        """Whether the next infer has a connection to go over."""
        return self._client.connected

    def infer(self, observation: Observation, prefix: np.ndarray | None = None, seed: int | None = None) -> ActionChunk:
        """As AsyncClient.infer, waiting for the reply."""
        if self._loop.is_closed():
            raise ConnectionError(f"{self._client.url}: the client is closed")
        return self._wait(self._client.infer(observation, prefix, seed))

    def close(self) -> None:
        """Close the connection and stop reconnecting; a call that waits raises ConnectionError."""
        if self._loop.is_closed():
            return
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _pauses() -> Iterator[float]:
    """Seconds between attempts: doubling, and spread so that many clients do not come back in step."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
