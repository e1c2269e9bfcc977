"""The blocking client of `xr0 serve`. It imports no torch: `pip install xr0-engine` on the robot is enough.

It reconnects by itself, in the background and with growing pauses, until it is closed; until then `infer` raises
ConnectionError at once, so that whoever executes chunks goes on with what it has. Every wait has a deadline.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, WebSocketException

from xr0_engine.serve.connecting import CLOSE_S, SHORTEST_TRY_S, Connecting, after, chunk_of, pauses
from xr0_engine.serve.protocol import Reply, decode_reply
from xr0_engine.types import ActionChunk, Guide, Observation

GRACE_S = 0.25
"""How much longer than its own deadline an attempt to connect is waited for, before the reason is not known: a name
that is not resolved cannot be interrupted."""


class Client(Connecting):
    """The blocking client: connects on creation. Close it, or use it as a context manager.

    url: ws://host:port or wss://host:port; without a scheme, ws. timeout_s: how long `infer` takes at most to send and
    to be answered, and the constructor to find the server, its warm-up included. jpeg_quality: 1 to 95 sends images as
    JPEG, None as they are. ca_file: certificates to trust, for wss with a certificate of one's own. Threads may share
    it; their calls take turns, and wait timeout_s at most for theirs. Raises ConnectionError if the server does not
    come, PermissionError if it refuses the API key, ValueError for a wrong argument.
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
        # Guards what follows, which the keeper's thread and the callers' share.
        self._changed = threading.Condition()
        self._connection: websockets.sync.client.ClientConnection | None = None
        self._due: float | None = None
        self._keeper_waits = False
        self._given_up = False
        threading.Thread(target=self._keep, name="xr0-connection", daemon=True).start()
        with self._changed:
            self._changed.wait_for(lambda: self._connection is not None or self._given_up, timeout_s + GRACE_S)
            if self.connected:
                return
            self._closed.set()
        raise self._lost

    @property
    def connected(self) -> bool:
        """Whether the next infer has a connection to go over, as far as is known."""
        return self._connection is not None

    def infer(
        self,
        observation: Observation,
        prefix: np.ndarray | None = None,
        seed: int | None = None,
        guide: Guide | None = None,
    ) -> ActionChunk:
        """The next chunk; its timing_ms also tells `queue` (waiting its turn), `server` and `round_trip`.

        prefix: (P, A) robot units in the frame of this observation, P within the metadata's prefix_range. guide: as in
        Engine.infer; Refused where the server's engine takes none, or is of a version that knows none. Raises
        ConnectionError if there is no connection or it is lost, without waiting for the next; Refused (a ValueError)
        for a wrong request; Busy or PolicyFailed (both RuntimeErrors) as the server says.
        """
        if not self._turn.acquire(timeout=self.timeout_s):
            raise ConnectionError(f"{self.url}: another thread's call has not ended within {self.timeout_s:g} s")
        try:
            connection = self._connection
            if connection is None:
                raise self._not_connected()
            start = time.perf_counter()
            number, message = self._request(observation, prefix, seed, guide)
            try:
                reply = self._exchange(connection, number, message)
            except TimeoutError:
                # A server that hangs is as good as none.
                self._lose(connection, f"no reply within {self.timeout_s:g} s")
                raise self._not_connected() from None
            except (ConnectionClosed, ValueError) as error:
                self._lose(connection, f"connection lost: {error}")
                raise self._not_connected() from None
        finally:
            self._turn.release()
        return chunk_of(reply, start)

    def close(self) -> None:
        """Close the connection and stop reconnecting; a call that waits raises ConnectionError. Takes 2 s at most."""
        with self._changed:
            self._closed.set()
            self._lost = ConnectionError(f"{self.url}: the client is closed")
            connection, self._connection = self._connection, None
            self._changed.notify_all()
        if connection is None:
            return
        # In order only if nobody is in the middle of a message: that might never end.
        if self._turn.acquire(blocking=False):
            limit = threading.Timer(2 * CLOSE_S, _cut, (connection,))
            limit.daemon = True
            limit.start()
            connection.close()
            limit.cancel()
            self._turn.release()
        else:
            _drop(connection)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _exchange(self, connection: websockets.sync.client.ClientConnection, number: int, message: bytes) -> Reply:
        """Raises TimeoutError, ConnectionClosed, or ValueError for what is no reply to it."""
        due = time.monotonic() + self.timeout_s
        self._watch(due)
        try:
            connection.send(message)
            while True:
                answer = connection.recv(max(due - time.monotonic(), 0))
                reply = decode_reply(answer)
                if reply.id == number:
                    self._check(reply, answer, message)
                    return reply
                # What comes twice on a bad network is no answer to this one, and no harm.
                if reply.id is None or reply.id > number:
                    raise ValueError(f"expected the reply to request {number}, got {reply}")
        except ConnectionClosed:
            if time.monotonic() >= due:
                raise TimeoutError from None
            raise
        finally:
            self._due = None

    def _watch(self, due: float) -> None:
        """Have the keeper cut the connection then. websockets itself sends without a deadline."""
        with self._changed:
            self._due = due
            # Otherwise it wakes up before, for one of the calls before this one.
            if self._keeper_waits:
                self._changed.notify_all()

    def _open(self, timeout_s: float) -> websockets.sync.client.ClientConnection:
        """Connected, and greeted by the server. Raises ConnectionError, PermissionError or ValueError."""
        deadline = time.monotonic() + timeout_s
        try:
            # Entered, never left: so websockets knows that it is no oversight that we close it ourselves.
            connection = websockets.sync.client.connect(**self._settings(timeout_s)).__enter__()
        except (OSError, EOFError, RuntimeError, WebSocketException) as error:
            raise self._cannot_connect(error) from None
        try:
            self._greeted(connection.recv(max(deadline - time.monotonic(), SHORTEST_TRY_S)))
        except (ConnectionClosed, TimeoutError) as error:
            _drop(connection)
            raise ConnectionError(f"{self.url}: no greeting: {str(error) or type(error).__name__}") from None
        except ValueError:
            _drop(connection)
            raise
        return connection

    def _lose(self, connection: websockets.sync.client.ClientConnection, reason: str) -> None:
        _drop(connection)
        with self._changed:
            if self._closed.is_set():
                return
            self._connection = None
            self._note(ConnectionError(f"{self.url}: {reason}"))
            self._changed.notify_all()

    def _keep(self) -> None:
        """The keeper's thread: gets a connection, watches over it until it is lost, gets the next, until closed."""
        connection = self._connect()
        while connection is not None:
            with self._changed:
                if not self._closed.is_set():
                    self._connection = connection
                self._changed.notify_all()
            if self._connection is None:
                _drop(connection)
                return
            self._watch_over(connection)
            connection = self._connect_again()

    def _connect(self) -> websockets.sync.client.ClientConnection | None:
        """The first connection; None if there is none within timeout_s, or none to be expected."""
        deadline = time.monotonic() + self.timeout_s
        for pause_s in pauses():
            try:
                return self._open(max(deadline - time.monotonic(), SHORTEST_TRY_S))
            except (ConnectionError, PermissionError, ValueError) as error:
                self._note(error)
                if not isinstance(error, ConnectionError) or time.monotonic() + pause_s > deadline:
                    break
                if self._closed.wait(pause_s):
                    break
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
        return None

    def _connect_again(self) -> websockets.sync.client.ClientConnection | None:
        """The next connection, however long it takes; None once it is closed."""
        for pause_s in pauses():
            if self._closed.wait(after(self._lost, pause_s)):
                break
            try:
                return self._open(self.timeout_s)
            except (ConnectionError, PermissionError, ValueError) as error:
                with self._changed:
                    if not self._closed.is_set():
                        self._note(error)
        return None

    def _watch_over(self, connection: websockets.sync.client.ClientConnection) -> None:
        """Until it is lost or closed: cut it when a call is due that has not ended."""
        with self._changed:
            while self._connection is connection:
                left_s = None if self._due is None else self._due - time.monotonic()
                if left_s is not None and left_s <= 0:
                    self._due = left_s = None
                    _cut(connection)
                self._keeper_waits = left_s is None
                self._changed.wait(left_s)
                self._keeper_waits = False


def _cut(connection: websockets.sync.client.ClientConnection) -> None:
    """End it at once, whoever is sending or receiving."""
    with suppress(OSError):
        # Not a TLS socket's own method: that forgets the encryption first, and a thread that sends would go on without.
        socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)


def _drop(connection: websockets.sync.client.ClientConnection) -> None:
    """Closing in order would wait for a server that does not answer."""
    _cut(connection)
    connection.close()
