"""The server: websockets in, chunks out, and a few pages over HTTP on the same port (docs/serving.md).

The event loop reads and answers; inference runs in the Backend.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from xr0_engine.serve.connection import ClientConnection
from xr0_engine.serve.gate import ACCEPTED_AT_ONCE, Gate
from xr0_engine.serve.legacy import LegacyPorts
from xr0_engine.serve.pages import answer_http
from xr0_engine.serve.protocol import encode_metadata
from xr0_engine.serve.service import ServerConfig, Service, Watch
from xr0_engine.serve.worker import Backend

log = logging.getLogger("xr0_engine.serve")

# websockets reports every failed handshake of every port scanner as an error with a traceback.
_websockets_log = logging.getLogger("xr0_engine.serve.websockets")
_websockets_log.setLevel(logging.CRITICAL)

HANDSHAKE_S = 5.0
"""How long a connection may take to say what it wants, TLS included, and to take its page."""
KEEPALIVE_S = 20.0
CLOSE_S = 1.0
"""How long a client has to agree that its connection is closed."""
MAX_HEAD_BYTES = 64 << 10
"""Of an HTTP request. Browsers send the cookies of every server of this machine's name along."""
LONGEST_READ_S = 0.1
"""Processor time to take frames out of what came at once, at most 256 KiB. Images take less than a millisecond, pings
without pause nearly a second, in which nobody else is served."""


class Server(Service):
    """Serves one backend. Make it, then await run. watch: who is told of each answer."""

    def __init__(self, backend: Backend, config: ServerConfig, watch: Watch | None = None) -> None:
        super().__init__(backend, config, watch)
        # Nothing but the head of a request comes before a client has its place.
        self.gate = Gate(HANDSHAKE_S, MAX_HEAD_BYTES, lambda: self.monitor.rejected("too_many_connections"))

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None] = lambda port: None) -> None:
        """Listen, load, serve until stop is set, then answer what was asked and close, all within drain_s.

        listening: called with the port once it is open, before the engine is loaded. Raises OSError if the port cannot
        be had, and what the backend raises on start.
        """
        async with AsyncExitStack() as stack:
            servers = [
                await stack.enter_async_context(self._serve(listener))
                for listener in self.gate.listen(self.config.host, self.config.port)
            ]
            listening(next(iter(servers[0].sockets)).getsockname()[1])
            released = LegacyPorts(self)
            try:
                for port in self.config.legacy_ports:
                    await released.listen(self.config.host, port)
                if await self._start_before(stop):
                    await stop.wait()
                    await self.drain()
                    for server in servers:
                        server.close(reason="the server is shutting down")
            finally:
                self.gate.close()
                await released.close()
                await self.close()

    def _serve(self, listener: object) -> AbstractAsyncContextManager[Any]:
        return serve(
            self._handle,
            sock=listener,
            process_request=lambda connection, request: answer_http(self, connection, request),
            # It takes any callable that makes one, as its documentation says and its types do not.
            create_connection=partial(_CountedConnection, self),  # type: ignore[arg-type]
            # A page in a browser must not reach a robot's server: browsers send an origin, clients do not.
            origins=[None],
            compression=None,
            open_timeout=HANDSHAKE_S,
            ping_interval=KEEPALIVE_S,
            ping_timeout=KEEPALIVE_S,
            close_timeout=CLOSE_S,
            max_size=self.config.max_message_bytes,
            # One message being read while another is looked at: a large limit times a long queue is a lot of memory.
            max_queue=1,
            server_header=None,
            backlog=ACCEPTED_AT_ONCE,
            ssl=self.config.tls,
            logger=_websockets_log,
        )

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
        key = self.keys_of.get(connection)
        number = self.admit("{}:{}".format(*connection.remote_address[:2]), key)
        self.gate.has_passed(connection.transport)
        if number is None:
            await connection.close(1013, self.why_full(key) or "too many clients")
            return
        try:
            metadata = await self.ready()
            greeting = encode_metadata(metadata)
            await connection.send(greeting)
            await ClientConnection(self, connection, metadata, greeting, number).run()
        except ConnectionClosed:
            pass
        except BaseException:
            log.exception("client %d: the connection is closed after a fault of the server", number)
            raise
        finally:
            self.release(number)


class _CountedConnection(ServerConnection):
    """Ends what sends no end of a request's head, and what keeps the loop from everyone else."""

    def __init__(self, owner: Server, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._owner = owner
        self._head_bytes = 0

    def data_received(self, data: bytes) -> None:
        start = time.thread_time()
        super().data_received(data)
        if self.request is None:
            self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES or time.thread_time() - start > LONGEST_READ_S:
            self._owner.monitor.rejected("flooding")
            self.transport.abort()


class BackgroundServer:
    """A server on a thread of this process, for measurements and tests: `with BackgroundServer(backend) as server`.

    url: where clients find it. watch: as in Server. Entering waits until it is ready; leaving shuts it down in order.
    """

    def __init__(self, backend: Backend, config: ServerConfig | None = None, watch: Watch | None = None) -> None:
        self.server = Server(backend, config or ServerConfig(port=0), watch)
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
