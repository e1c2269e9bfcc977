"""The blocking client of `xr0 serve`. It imports no torch: `pip install xr0-engine` on the robot is enough.

It reconnects by itself, in the background and with growing pauses; until then `infer` raises ConnectionError at once,
so that whoever executes chunks goes on with what it has.
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
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

from xr0_engine.serve.connecting import SHORTEST_TRY_S, Connecting, chunk_of, pauses
from xr0_engine.serve.protocol import decode_reply
from xr0_engine.types import ActionChunk, Observation


class Client(Connecting):
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
        for pause_s in pauses():
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
        return chunk_of(reply, start)

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
        for pause_s in pauses():
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
