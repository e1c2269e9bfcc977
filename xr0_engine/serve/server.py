"""The server: websockets in, chunks out, and a few pages over HTTP on the same port (docs/serving.md).

The event loop reads and answers; inference runs in the Backend.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType

from websockets.asyncio.server import Server as WebsocketServer
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from xr0_engine.serve.connection import ClientConnection
from xr0_engine.serve.legacy import serve_legacy
from xr0_engine.serve.pages import answer_http
from xr0_engine.serve.protocol import encode_metadata
from xr0_engine.serve.service import ServerConfig, Service
from xr0_engine.serve.worker import Backend

log = logging.getLogger("xr0_engine.serve")

# websockets reports every failed handshake of every port scanner as an error with a traceback.
_websockets_log = logging.getLogger("xr0_engine.serve.websockets")
_websockets_log.setLevel(logging.CRITICAL)

HANDSHAKE_S = 5.0
KEEPALIVE_S = 20.0
SPARE_CONNECTIONS = 32
"""Connections beyond the clients: pages, metrics, and those that are being turned away."""
LONGEST_READ_S = 0.1
"""Processor time to take frames out of what came at once, at most 256 KiB. Images take less than a millisecond, pings
without pause nearly a second, in which nobody else is served."""


class Server(Service):
    """Serves one backend. Make it, then await run."""

    connections = 0

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
                self.shut("closed")
                await self._backend.close()

    async def _start(self, stop: asyncio.Event) -> bool:
        """Whether the backend came up before it was told to stop."""
        starting, stopping = asyncio.ensure_future(self._backend.start()), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                return False
            metadata = self.open(starting.result())
        finally:
            starting.cancel()
            stopping.cancel()
        log.info("ready: %s", ", ".join(metadata.robot_types))
        return True

    async def _listen_legacy(self) -> asyncio.Server | None:
        if self.config.legacy_port is None:
            return None
        return await serve_legacy(self, self.config.host, self.config.legacy_port)

    async def _drain(self, websocket_server: WebsocketServer) -> None:
        self.shut("draining")
        log.info("shutting down: %d clients", len(self.clients))
        deadline = time.monotonic() + self.config.drain_s
        while any(client.busy for client in self.clients) and time.monotonic() < deadline:
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
            client = ClientConnection(self, connection, metadata, number)
            self.clients.add(client)
            try:
                await client.run()
            finally:
                self.clients.discard(client)
        except ConnectionClosed:
            pass
        except BaseException:
            log.exception("client %d: the connection is closed after a fault of the server", number)
            raise
        finally:
            self.release(number)


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
