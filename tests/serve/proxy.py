"""What may stand between a client and a server, and how it misbehaves."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

STATUS = b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n"


class Proxy:
    """Passes bytes to a port of this machine and back. mode, which connections to come and those that are there go by:

    pass; hold: reads nothing and sends nothing; flip: damages what the server sends; a text such as "403 Forbidden":
    answers with that. cut ends what is connected.
    """

    def __init__(self, port: int) -> None:
        self.mode = "pass"
        self._to = port
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._moving = threading.Event()
        self._moving.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._moving.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def hold(self) -> None:
        self._moving.clear()

    def go_on(self) -> None:
        self._moving.set()

    def cut(self) -> None:
        for pair in self._pairs:
            for one in pair:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.mode[0].isdigit():
                    client.recv(1 << 16)
                    client.sendall(STATUS % self.mode.encode())
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._to))
                self._pairs.append((client, server))
                for source, sink, is_back in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pass, args=(source, sink, is_back), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, is_back: bool) -> None:
        with suppress(OSError):
            while self._moving.wait() and (data := source.recv(1 << 16)):
                # A websocket's handshake stays whole: what follows is damaged.
                if is_back and self.mode == "flip" and not data.startswith(b"HTTP"):
                    data = bytes(byte ^ 0x55 for byte in data)
                self._moving.wait()
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
