"""The server: websockets in, chunks out, and a few pages over HTTP on the same port (docs/serving.md).

The event loop reads and answers; inference runs in the Backend.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType

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
            released: list[asyncio.Server] = []
            try:
                for port in self.config.legacy_ports:
                    released.append(await serve_legacy(self, self.config.host, port))
                if await self._start_before(stop):
                    await stop.wait()
                    await self.drain()
                    websocket_server.close(reason="the server is shutting down")
            finally:
                for listener in released:
                    listener.close()
                await self.close()

    async def _start_before(self, stop: asyncio.Event) -> bool:
        """Whether the backend came up before it was told to stop."""
        starting, stopping = asyncio.create_task(self.start()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
            return starting.done()
        finally:
            starting.cancel()
            stopping.cancel()

    async def _handle(self, connection: ServerConnection) -> None:
        """One client, from handshake to end."""
        number = self.admit("{}:{}".format(*connection.remote_address[:2]))
        if number is None:
            await connection.close(1013, f"expected at most {self.config.max_clients} clients")
            return
        try:
            metadata = await self.ready()
            await connection.send(encode_metadata(metadata))
            await ClientConnection(self, connection, metadata, number).run()
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


class BackgroundServer:
    """A server on a thread of this process, for measurements and tests: `with BackgroundServer(backend) as server`.

    url: where clients find it. Entering waits until it is ready; leaving shuts it down in order.
    """

    def __init__(self, backend: Backend, config: ServerConfig | None = None) -> None:
        self.server = Server(backend, config or ServerConfig(port=0))
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()

    @property
    def url(self) -> str:
        scheme = "ws" if self.server.config.tls is None else "wss"
        return f"{scheme}://localhost:{self.port}"

    def __enter__(self) -> BackgroundServer:
        thread = ThreadPoolExecutor(1, thread_name_prefix="xr0-server")
        self._running = thread.submit(self._run)
        thread.shutdown(wait=False)
        while self.server.state == "warming up" and not self._running.done():
            time.sleep(0.001)
        if self.server.state != "ready":
            self._running.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._running.result()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self.server.run(self._stop, self._listening))
        finally:
            self._loop.close()

    def _listening(self, port: int) -> None:
        self.port = port
