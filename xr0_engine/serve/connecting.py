"""What both clients share: where to connect, what to send, how to read the answer."""

from __future__ import annotations

import logging
import random
import ssl
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import InvalidStatus, InvalidURI

from xr0_engine.serve.protocol import PolicyMetadata, Refused, Reply, Request, check_digest, decode_metadata, exchanged
from xr0_engine.serve.requests import encode_request
from xr0_engine.types import ActionChunk, Guide, Observation, RobotInfo

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 5.0
SLOW_PAUSE_S = 2.0
"""At least, after an answer that another try will hardly change at once: a refused key, another policy, a greeting that
makes no sense. Whoever is at fault there is not to be flooded; the next answer may be right all the same."""
KEEPALIVE_S = 5.0
CLOSE_S = 1.0
SHORTEST_TRY_S = 0.01
MAX_REPLY_BYTES = 16 << 20

# websockets logs what it raises as well, with its traceback: on a robot's terminal nobody can do anything about it.
_websockets_log = logging.getLogger("xr0_engine.serve.websockets")
_websockets_log.setLevel(logging.CRITICAL)


class Connecting:
    """A client without its connection. Arguments as in Client."""

    def __init__(
        self, url: str, api_key: str | None, timeout_s: float, jpeg_quality: int | None, ca_file: str | Path | None
    ) -> None:
        self.url = url if "://" in url else f"ws://{url}"
        if not self.url.startswith(("ws://", "wss://")):
            raise ValueError(f"url: expected ws://host:port or wss://host:port, got {url!r}")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
        if jpeg_quality is not None and (type(jpeg_quality) is not int or not 1 <= jpeg_quality <= 95):
            raise ValueError(f"jpeg_quality: expected 1 to 95 as a whole number, or None, got {jpeg_quality!r}")
        self.timeout_s = timeout_s
        self._jpeg_quality = jpeg_quality
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._tls = _tls(self.url, ca_file)
        self._metadata: PolicyMetadata | None = None
        # CRC-32 of this connection's greeting, and whether its replies bring a digest, which an older server's do not.
        self._greeting = 0
        self._has_digests = False
        self._numbers = 0
        self._lost: Exception = ConnectionError(f"{self.url}: not connected yet")
        self._last_error: str | None = None
        _keep_freed_memory()

    @property
    def last_error(self) -> str | None:
        """Why the connection was lost, or could not be had, the last time; None if that never happened.

        It stays when the connection is back: `connected` tells whether it is.
        """
        return self._last_error

    @property
    def metadata(self) -> PolicyMetadata:
        """What the server serves. Raises ConnectionError before the first connection."""
        if self._metadata is None:
            raise ConnectionError(f"{self.url}: not connected yet")
        return self._metadata

    def robot_info(self, robot_type: str | None = None) -> RobotInfo:
        """How a robot type is driven; None: the only one. Raises ValueError for one that is not served, ConnectionError
        before the first connection."""
        return self.metadata.robot(robot_type)

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
            "logger": _websockets_log,
        }

    def _cannot_connect(self, error: Exception) -> Exception:
        """What the caller is told: ConnectionError if another try may do at once."""
        if isinstance(error, InvalidURI):
            return ValueError(f"url: expected ws://host:port, got {self.url!r}: {error}")
        if isinstance(error, InvalidStatus):
            status, body = error.response.status_code, (error.response.body or b"").decode(errors="replace")[:500]
            kind = PermissionError if status in (401, 403) else ConnectionError
            return kind(f"{self.url}: HTTP {status}: {body}")
        return ConnectionError(f"{self.url}: cannot connect: {str(error) or type(error).__name__}")

    def _greeted(self, greeting: str | bytes) -> None:
        """Raises ValueError if the server speaks another protocol, or serves something else than it did."""
        content = greeting if isinstance(greeting, bytes) else greeting.encode()
        metadata = decode_metadata(content)
        if self._metadata is not None and metadata != self._metadata:
            raise ValueError(f"{self.url}: the server came back with another policy; make a new client for it")
        self._metadata = metadata
        self._greeting, self._has_digests = zlib.crc32(content), False

    def _check(self, reply: Reply, message: bytes | str, request: bytes) -> None:
        """Raises ValueError for a chunk that was damaged, or that answers a damaged request. message: the reply's."""
        if reply.chunk is not None and (self._has_digests or reply.digest is not None):
            check_digest(reply, message, exchanged(self._greeting, request))
            self._has_digests = True

    def _note(self, error: Exception) -> None:
        """Remember why there is no connection."""
        self._lost, self._last_error = error, str(error)

    def _not_connected(self) -> Exception:
        if isinstance(self._lost, PermissionError):
            return PermissionError(str(self._lost))
        return ConnectionError(str(self._lost))

    def _request(
        self, observation: Observation, prefix: np.ndarray | None, seed: int | None, guide: Guide | None
    ) -> tuple[int, bytes]:
        """The number of the next request, and the request."""
        self._numbers += 1
        request, metadata = Request(observation, prefix, seed, self._numbers, guide=guide), self.metadata
        videos = any(robot.history is not None for robot in metadata.robots.values())
        message = encode_request(request, self._jpeg_quality, metadata.max_image_pixels, videos)
        if len(message) > metadata.max_message_bytes:
            raise Refused(f"message: expected at most {metadata.max_message_bytes} bytes, got {len(message)}")
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
    anew, with a page fault for each 4 KiB. This block itself costs nothing: nobody touches it.
    """
    bytes(31 << 20)


def chunk_of(reply: Reply, start: float) -> ActionChunk:
    """start: when the request was begun, by perf_counter. Raises the reply's error, if it holds one."""
    if reply.error is not None:
        raise reply.error
    assert reply.chunk is not None
    round_trip_ms = 1e3 * (time.perf_counter() - start)
    return replace(reply.chunk, timing_ms={**reply.chunk.timing_ms, "round_trip": round_trip_ms})


def pauses() -> Iterator[float]:
    """Seconds between attempts: doubling, and spread so that many clients do not come back in step."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def after(error: Exception, pause_s: float) -> float:
    """Seconds before the next attempt: pause_s, or longer where the server or a gateway gave a wrong answer."""
    return pause_s if isinstance(error, ConnectionError) else max(pause_s, SLOW_PAUSE_S * random.uniform(0.5, 1.0))
