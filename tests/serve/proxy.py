"""What may stand between a client and a server, and how it misbehaves."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress

STATUS = b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n"


class Trouble:
    """A bad network: so many of the pieces that pass are delayed, cut off, changed in one bit, or sent twice.

    share: of the pieces, one of them about a message. counts: how many of each kind.
    """

    KINDS = ("delay", "cut", "flip", "duplicate")
    LONGEST_S = 1.0

    def __init__(self, share: float, seed: int) -> None:
        self.share = share
        self.counts: Counter[str] = Counter(dict.fromkeys(self.KINDS, 0))
        self._chance = random.Random(seed)
        self._lock = threading.Lock()

    def befall(self, piece: bytes) -> bytes:
        """What comes of a piece. Raises ConnectionError where it is cut off."""
        with self._lock:
            if self._chance.random() >= self.share:
                return piece
            kind = self._chance.choice(self.KINDS)
            place, bit = self._chance.randrange(len(piece)), 1 << self._chance.randrange(8)
            pause_s = self._chance.uniform(0, self.LONGEST_S)
            self.counts[kind] += 1
        if kind == "cut":
            raise ConnectionError
        if kind == "delay":
            time.sleep(pause_s)
        if kind == "flip":
            piece = piece[:place] + bytes([piece[place] ^ bit]) + piece[place + 1 :]
        return piece + piece if kind == "duplicate" else piece


class Proxy:
    """Passes bytes to a port of this machine and back. mode, which connections to come and those that are there go by:

    pass; hold: reads nothing and sends nothing; flip: damages what the server sends; a text such as "403 Forbidden":
    answers with that. cut ends what is connected. trouble: befalls what passes, if given.
    """

    def __init__(self, port: int, trouble: Trouble | None = None) -> None:
        self.mode = "pass"
        self.trouble = trouble
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
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._to)) as server:
            pair = client, server
            self._pairs.append(pair)
            back = threading.Thread(target=self._pass, args=(server, client, True), daemon=True)
            back.start()
            self._pass(client, server, False)
            back.join()
            with suppress(ValueError):
                self._pairs.remove(pair)

    def _pass(self, source: socket.socket, sink: socket.socket, is_back: bool) -> None:
        with suppress(OSError):
            while self._moving.wait() and (data := source.recv(1 << 16)):
                # A websocket's handshake stays whole: what follows is damaged.
                if is_back and self.mode == "flip" and not data.startswith(b"HTTP"):
                    data = bytes(byte ^ 0x55 for byte in data)
                if self.trouble is not None:
                    data = self.trouble.befall(data)
                self._moving.wait()
                sink.sendall(data)
        for one in (source, sink):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
