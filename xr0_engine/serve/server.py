"""The server: websockets in, chunks out, and a few pages over HTTP on the same port (docs/serving.md).

The event loop reads and answers; inference runs in the Backend. A client has at most one request waiting, its newest,
and at most one at work; clients take turns in the order in which they came to wait, which is round robin.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Protocol

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from xr0_engine.serve.access import check_bind, is_loopback
from xr0_engine.serve.connection import Session
from xr0_engine.serve.monitor import Monitor
from xr0_engine.serve.pages import answer_http
from xr0_engine.serve.protocol import (
    DEFAULT_PORT,
    PolicyFailed,
    PolicyMetadata,
    Refused,
    Request,
    check_chunk,
    encode_metadata,
)
from xr0_engine.serve.worker import Backend, Served
from xr0_engine.types import ActionChunk

log = logging.getLogger("xr0_engine.serve")

# websockets reports every failed handshake of every port scanner as an error with a traceback.
_websockets_log = logging.getLogger("xr0_engine.serve.websockets")
_websockets_log.setLevel(logging.CRITICAL)

FAILURES_UNTIL_UNHEALTHY = 3
"""Inferences that fail in a row until /healthz says so: a device that is lost does not come back by itself."""

HANDSHAKE_S = 5.0
KEEPALIVE_S = 20.0
SPARE_CONNECTIONS = 32
"""Connections beyond the clients: pages, metrics, and those that are being turned away."""
LONGEST_READ_S = 0.1
"""Processor time to take frames out of what came at once, at most 256 KiB. Images take less than a millisecond, pings
without pause nearly a second, in which nobody else is served."""


@dataclass(frozen=True)
class ServerConfig:
    """port: 0 takes a free one. keys: API keys, none = everyone who can reach the port. max_requests_per_s: of one
    client. max_prefix: longest prefix taken; None: what the engine was trained with. drain_s: how long a shutdown waits
    for requests that are being answered. legacy_port: of the released TCP protocol, None for none.

    Raises ValueError for an address beyond this machine without keys, unless allow_anyone.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    keys: tuple[str, ...] = ()
    allow_anyone: bool = False
    tls: ssl.SSLContext | None = None
    max_clients: int = 32
    max_message_bytes: int = 32 << 20
    max_image_pixels: int = 4 << 20
    max_requests_per_s: float = 200.0
    max_prefix: int | None = None
    drain_s: float = 10.0
    legacy_port: int | None = None

    def __post_init__(self) -> None:
        # Released clients bring no keys.
        check_bind(self.host, self.keys if self.legacy_port is None else (), self.allow_anyone)


class Server:
    """Serves one backend. Make it, then await run."""

    def __init__(self, backend: Backend, config: ServerConfig) -> None:
        self.config = config
        self.monitor = Monitor()
        self.state = "warming up"
        self.metadata: PolicyMetadata | None = None
        self._backend = backend
        self._turns = asyncio.Semaphore(backend.slots)
        self._ready = asyncio.Event()
        self.sessions: set[_HasBusy] = set()
        self._clients = 0
        self.connections = 0
        self._failures = 0
        # Without keys, its pages must not be reached under a name that some site's DNS gave this machine.
        self.is_for_this_machine = not config.keys and is_loopback(config.host)

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None] = lambda port: None) -> None:
        """Listen, load, serve until stop is set, then answer what was asked and close.

        listening: called with the port once it is open, before the engine is loaded. Raises OSError if the port cannot
        be had, and what the backend raises on start.
        """
        async with serve(
            self._handle,
            self.config.host,
            self.config.port,
            process_request=lambda connection, request: answer_http(self, request),
            # It takes any callable that makes one, as its documentation says and its types do not.
            create_connection=partial(_CountedConnection, self),  # type: ignore[arg-type]
            # A page in a browser must not reach a robot's server: browsers send an origin, clients do not.
            origins=[None],
            compression=None,
            open_timeout=HANDSHAKE_S,
            ping_interval=KEEPALIVE_S,
            ping_timeout=KEEPALIVE_S,
            max_size=self.config.max_message_bytes,
            # One message being read while another is looked at: a large limit times a long queue is a lot of memory.
            max_queue=1,
            server_header=None,
            # Connections that wait to be accepted: when they do not fit, the kernel has good ones wait for a second.
            backlog=1024,
            ssl=self.config.tls,
            logger=_websockets_log,
        ) as websocket_server:
            listening(next(iter(websocket_server.sockets)).getsockname()[1])
            legacy = await self._listen_legacy()
            try:
                if await self._start(stop):
                    await stop.wait()
                    await self._drain(websocket_server)
            finally:
                if legacy is not None:
                    legacy.close()
                self.state = "closed"
                self.monitor.set_ready(False)
                await self._backend.close()

    async def infer(self, request: Request) -> tuple[ActionChunk, float]:
        """The backend's chunk and the milliseconds it took. For those who hold a turn. Raises a ServerError."""
        start = time.perf_counter()
        try:
            chunk = await self._backend.infer(request)
        except ValueError as error:
            raise Refused(str(error)) from None
        except (RuntimeError, MemoryError) as error:
            raise self._failed(error) from error
        try:
            check_chunk(chunk)
        except ValueError as error:
            raise self._failed(error) from None
        self._failures = 0
        return chunk, 1e3 * (time.perf_counter() - start)

    def turn(self) -> asyncio.Semaphore:
        """Held while the backend works on a request; whoever waits longest gets it next."""
        return self._turns

    async def ready(self) -> PolicyMetadata:
        """Waits for the warm-up."""
        await self._ready.wait()
        assert self.metadata is not None
        return self.metadata

    def admit(self) -> bool:
        """Take a place for a client, if there is one; release gives it back."""
        if self.is_full:
            self.monitor.rejected("too_many_clients")
            return False
        self._clients += 1
        return True

    def release(self, number: int) -> None:
        """number: the client's, from monitor.connected."""
        self._clients -= 1
        self.monitor.disconnected(number)

    @property
    def draining(self) -> bool:
        return self.state == "draining"

    @property
    def is_full(self) -> bool:
        """Whether no further client has a place."""
        return self._clients >= self.config.max_clients

    def health(self) -> tuple[HTTPStatus, str]:
        if self.state != "ready":
            return HTTPStatus.SERVICE_UNAVAILABLE, self.state
        if self._failures >= FAILURES_UNTIL_UNHEALTHY:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"the last {self._failures} inferences failed"
        return HTTPStatus.OK, "ok"

    def _failed(self, error: BaseException) -> PolicyFailed:
        self._failures += 1
        log.error("inference failed: %s", error)
        return PolicyFailed(str(error) or type(error).__name__)

    async def _start(self, stop: asyncio.Event) -> bool:
        """Whether the backend came up before it was told to stop."""
        starting, stopping = asyncio.ensure_future(self._backend.start()), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            self.metadata = _metadata(starting.result(), self.config)
        finally:
            starting.cancel()
            stopping.cancel()
        self.state = "ready"
        self.monitor.set_ready(True)
        self._ready.set()
        log.info("ready: %s", ", ".join(self.metadata.robot_types))
        return True

    async def _listen_legacy(self) -> asyncio.Server | None:
        if self.config.legacy_port is None:
            return None
        from xr0_engine.serve.legacy import serve_legacy

        return await serve_legacy(self, self.config.host, self.config.legacy_port)

    async def _drain(self, websocket_server: WebsocketServer) -> None:
        self.state = "draining"
        self.monitor.set_ready(False)
        log.info("shutting down: %d clients", len(self.sessions))
        deadline = time.monotonic() + self.config.drain_s
        while any(session.busy for session in self.sessions) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        websocket_server.close(reason="the server is shutting down")

    async def _handle(self, connection: ServerConnection) -> None:
        """One client, from handshake to end."""
        if not self.admit():
            await connection.close(1013, f"expected at most {self.config.max_clients} clients")
            return
        number = self.monitor.connected(_address(connection))
        try:
            metadata = await self.ready()
            await connection.send(encode_metadata(metadata))
            session = Session(self, connection, metadata, number)
            self.sessions.add(session)
            try:
                await session.run()
            finally:
                self.sessions.discard(session)
        except ConnectionClosed:
            pass
        except BaseException:
            log.exception("client %d: the connection is closed after a fault of the server", number)
            raise
        finally:
            self.release(number)


class _HasBusy(Protocol):
    """A session of either protocol: busy while a request of it is unanswered."""

    @property
    def busy(self) -> bool: ...


class _CountedConnection(ServerConnection):
    """Turns away, before anything is read, what comes beyond all clients and a few more; and, later, what keeps the
    loop from everyone else."""

    def __init__(self, owner: Server, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._owner.connections += 1
        self._turned_away = self._owner.connections > self._owner.config.max_clients + SPARE_CONNECTIONS
        if not self._turned_away:
            super().connection_made(transport)
            return
        self._owner.monitor.rejected("too_many_connections")
        assert isinstance(transport, asyncio.WriteTransport)
        transport.abort()

    def data_received(self, data: bytes) -> None:
        start = time.thread_time()
        super().data_received(data)
        if time.thread_time() - start > LONGEST_READ_S:
            self._owner.monitor.rejected("flooding")
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._owner.connections -= 1
        if not self._turned_away:
            super().connection_lost(exc)


def _metadata(served: Served, config: ServerConfig) -> PolicyMetadata:
    shortest = min(robot.chunk_length for robot in served.robots.values())
    longest = served.max_prefix if config.max_prefix is None else config.max_prefix
    return PolicyMetadata(
        robots=served.robots,
        action_width=served.action_width,
        state_width=served.state_width,
        prefix_range=(0, min(longest, shortest)),
        max_message_bytes=config.max_message_bytes,
        max_image_pixels=config.max_image_pixels,
        max_requests_per_s=config.max_requests_per_s,
    )


def _address(connection: ServerConnection) -> str:
    host, port = connection.remote_address[:2]
    return f"{host}:{port}"


class BackgroundServer:
    """A server on a thread of this process, for measurements and tests: `with BackgroundServer(backend) as server`.

    url: where clients find it. Entering waits until it is ready; leaving shuts it down in order.
    """

    def __init__(self, backend: Backend, config: ServerConfig | None = None) -> None:
        self.server = Server(backend, config or ServerConfig(port=0))
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xr0-server")
        self._fault: BaseException | None = None

    @property
    def url(self) -> str:
        scheme = "ws" if self.server.config.tls is None else "wss"
        return f"{scheme}://localhost:{self.port}"

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        self._listening.wait()
        while self.server.state == "warming up" and self._thread.is_alive():
            time.sleep(0.001)
        if self.server.state != "ready":
            self._thread.join()
            assert self._fault is not None
            raise self._fault
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        def listening(port: int) -> None:
            self.port = port
            self._listening.set()

        try:
            self._loop.run_until_complete(self.server.run(self._stop, listening))
        except BaseException as fault:
            self._fault = fault
        finally:
            self._listening.set()
            self._loop.close()
