"""What a client's connection, the pages and the released protocol need of a server: places, turns, health, chunks.

A client has at most one request at work; clients take turns in the order in which they came to wait, which is round
robin.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import Protocol
from weakref import WeakKeyDictionary

from websockets.asyncio.server import ServerConnection

from xr0_engine.serve.access import WrongKeys, check_bind, is_loopback
from xr0_engine.serve.decoding import DecodeAllowance, Decoder
from xr0_engine.serve.guarding import ServerGuard
from xr0_engine.serve.monitor import Monitor
from xr0_engine.serve.protocol import DEFAULT_PORT, PolicyFailed, PolicyMetadata, Refused, Request, check_chunk
from xr0_engine.serve.worker import Backend, Served
from xr0_engine.types import ActionChunk, RobotInfo

log = logging.getLogger("xr0_engine.serve")

LAST_PORT = 65535
LEGACY_FORMATS = ("pickle", "npz")
"""Of messages of the released protocols: Xiaomi-Robotics-0's clients send pickles, Xiaomi-Robotics-1's archives."""
FAILURES_UNTIL_UNHEALTHY = 3
"""Inferences that fail in a row until /healthz says so: a device that is lost does not come back by itself."""
KEPT_FOR_EACH_KEY = 2
"""Places that one key leaves to each of the others: one for its session, one while a lost one is not noticed yet."""
HEALTH_S = 1.0
"""How often the server looks at its own health."""
CLOSING_S = 2.0
"""Of a shutdown's time, for what comes after the last answer."""


@dataclass(frozen=True)
class ServerConfig:
    """port: 0 takes a free one. keys: API keys, none = everyone who can reach the port. max_requests_per_s: of one
    client. max_prefix: longest prefix taken; None: what the engine was trained with. max_clients_per_key: of
    max_clients; None: all but KEPT_FOR_EACH_KEY for each other key. max_inference_s: while one inference takes longer,
    the server is unhealthy. max_unhealthy_s: `xr0 serve` ends once it has been for so long; None: it goes on. drain_s:
    how long a shutdown takes at most, with the wait for requests that are being answered. host_names: names of this
    machine that it does not know of itself; without keys its pages are shown under no other. legacy_port: of the
    released TCP protocols, None for none. legacy_ranks: how many ports they are spoken on from legacy_port on: rank r
    of a released evaluation connects to legacy_port + r. legacy_formats: what messages may be there, of LEGACY_FORMATS.
    guard: a guard.json, by which it warns of what clients see and are answered.

    Raises ValueError for an address beyond this machine without keys, unless allow_anyone, and for ports that are none.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    keys: tuple[str, ...] = ()
    allow_anyone: bool = False
    tls: ssl.SSLContext | None = None
    max_clients: int = 32
    max_clients_per_key: int | None = None
    max_message_bytes: int = 32 << 20
    max_image_pixels: int = 4 << 20
    max_requests_per_s: float = 200.0
    max_prefix: int | None = None
    max_inference_s: float = 30.0
    max_unhealthy_s: float | None = None
    drain_s: float = 10.0
    host_names: tuple[str, ...] = ()
    legacy_port: int | None = None
    legacy_ranks: int = 1
    legacy_formats: tuple[str, ...] = ("pickle",)
    guard: Path | None = None

    def __post_init__(self) -> None:
        # Released clients bring no keys.
        check_bind(self.host, self.keys if self.legacy_port is None else (), self.allow_anyone)
        if self.legacy_ranks < 1 or (self.legacy_ports and self.legacy_ports[-1] > LAST_PORT):
            raise ValueError(
                f"legacy_ranks: expected at least 1, and ports up to {LAST_PORT}, got {self.legacy_ranks} from "
                f"{self.legacy_port} on"
            )
        if not self.legacy_formats or not set(self.legacy_formats) <= set(LEGACY_FORMATS):
            raise ValueError(f"legacy_formats: expected {' and '.join(LEGACY_FORMATS)}, got {self.legacy_formats}")

    @property
    def places_per_key(self) -> int:
        """How many clients may come with one key."""
        if self.max_clients_per_key is not None:
            return min(self.max_clients_per_key, self.max_clients)
        return max(self.max_clients - KEPT_FOR_EACH_KEY * max(len(self.keys) - 1, 0), 1)

    @property
    def legacy_ports(self) -> range:
        first = self.legacy_port
        return range(0) if first is None else range(first, first + self.legacy_ranks)


class Watch(Protocol):
    """Who is told of each answer, from the event loop: answered and left have to return at once."""

    def answered(
        self, client: int, request: Request, chunk: ActionChunk, timing_ms: Mapping[str, float], robot: RobotInfo
    ) -> None:
        """client: its number. timing_ms: as in Monitor.answered. robot: of the chunk's robot type."""

    def left(self, client: int) -> None:
        """That client has gone: there is no further answer to it, nor another client of its number."""

    def close(self) -> None:
        """The server has closed. May take its time; an OSError is logged."""


class Service:
    """One backend among its clients.

    busy: numbers of the clients with an unanswered request, which shutting down waits for. turns: one is held while the
    backend works on a request; whoever waits longest gets the next; none before it is ready. network_backend: what runs
    the network and why, empty before it is known. keys_of: which key a connection came with, where it takes one.
    decoder: where pictures are decoded. pages: what all the pages together may have encoded. watch: who is told of each
    answer.
    """

    def __init__(self, backend: Backend, config: ServerConfig, watch: Watch | None = None) -> None:
        self.config, self._watch = config, watch
        self.guard = None if config.guard is None else ServerGuard(config.guard)
        self.monitor = Monitor(self.guard)
        self.state = "warming up"
        self.metadata: PolicyMetadata | None = None
        self.network_backend = ""
        self.busy: set[int] = set()
        self.turns = asyncio.Semaphore(0)
        self._backend = backend
        self._ready = asyncio.Event()
        self._failures = 0
        self._keys: dict[int, int | None] = {}
        self.keys_of: WeakKeyDictionary[ServerConnection, int | None] = WeakKeyDictionary()
        self.wrong_keys = WrongKeys()
        self.decoder = Decoder()
        self.pages = DecodeAllowance()
        # Without keys, its pages must not be reached under a name that some site's DNS gave this machine.
        self.is_for_this_machine = not config.keys and is_loopback(config.host)

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

    def answered(self, client: int, request: Request, chunk: ActionChunk, timing_ms: Mapping[str, float]) -> None:
        """Counts and shows what a client got. timing_ms: as in Monitor.answered."""
        self.monitor.answered(client, request.observation, chunk, timing_ms)
        if self._watch is not None and self.metadata is not None:
            self._watch.answered(client, request, chunk, timing_ms, self.metadata.robots[chunk.robot_type])

    async def ready(self) -> PolicyMetadata:
        """Waits for the warm-up."""
        await self._ready.wait()
        assert self.metadata is not None
        return self.metadata

    def admit(self, address: str, key: int | None = None, released: bool = False) -> int | None:
        """A place for a client: its number, for release; None if there is none. key, released: as in why_full."""
        if self.why_full(key, released):
            self.monitor.rejected("too_many_clients")
            return None
        number = self.monitor.connected(address)
        if not released:
            self._keys[number] = key
        return number

    def release(self, number: int) -> None:
        self.busy.discard(number)
        self._keys.pop(number, None)
        self.monitor.disconnected(number)
        if self._watch is not None:
            self._watch.left(number)

    @property
    def draining(self) -> bool:
        return self.state == "draining"

    def why_full(self, key: int | None, released: bool = False) -> str | None:
        """Why no further client has a place, or none with this key; None if one has. key: the one it came with.
        released: it speaks the released protocol, whose clients have as many places of their own: they bring no key,
        and must not keep out who does."""
        places = self.config.max_clients
        if (len(self.monitor.clients) - len(self._keys) if released else len(self._keys)) >= places:
            return f"too many clients: expected at most {places}"
        places = self.config.places_per_key
        if key is not None and Counter(self._keys.values())[key] >= places:
            return f"too many clients with this key: expected at most {places}"
        return None

    def health(self) -> tuple[HTTPStatus, str]:
        if self.state != "ready":
            return HTTPStatus.SERVICE_UNAVAILABLE, self.state
        if self._failures >= FAILURES_UNTIL_UNHEALTHY:
            return HTTPStatus.SERVICE_UNAVAILABLE, f"the last {self._failures} inferences failed"
        if fault := self._backend.fault(self.config.max_inference_s):
            return HTTPStatus.SERVICE_UNAVAILABLE, fault
        return HTTPStatus.OK, "ok"

    async def until_unhealthy(self, lasting_s: float) -> str:
        """Waits until a server that was ready has been unhealthy for so long without a break. Returns why it is."""
        since_s: float | None = None
        while True:
            status, text = self.health()
            if self.state != "ready" or status == HTTPStatus.OK:
                since_s = None
            elif since_s is None:
                since_s = time.monotonic()
            elif time.monotonic() - since_s >= lasting_s:
                return text
            await asyncio.sleep(min(HEALTH_S, lasting_s))

    async def start(self) -> None:
        """Warm up the backend; from then on there are chunks to be had. Raises what the backend raises."""
        served = await self._backend.start()
        self.turns = asyncio.Semaphore(self._backend.slots)
        self.metadata, self.network_backend = _metadata(served, self.config), served.backend
        if self.guard is not None:
            self.monitor.guarded = self.guard.start(self.metadata.robots, self.monitor.warned)
        self.state = "ready"
        self.monitor.set_ready(True)
        self._ready.set()
        log.info("ready: %s; backend %s", ", ".join(self.metadata.robot_types), self.network_backend or "not told")

    async def drain(self) -> None:
        """Answer what was asked, and take no new requests any more; as long as drain_s leaves time to close."""
        self._shut("draining")
        log.info("shutting down: %d clients", len(self.monitor.clients))
        deadline = time.monotonic() + max(self.config.drain_s - CLOSING_S, self.config.drain_s / 2)
        while self.busy and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    async def close(self) -> None:
        self._shut("closed")
        self.decoder.close()
        if self.guard is not None:
            self.guard.close()
        await self._backend.close()
        if self._watch is not None:
            try:
                await asyncio.to_thread(self._watch.close)
            except OSError as error:
                log.error("%s", error)

    def _failed(self, error: BaseException) -> PolicyFailed:
        self._failures += 1
        log.error("inference failed: %s", error)
        return PolicyFailed(str(error) or type(error).__name__)

    def _shut(self, state: str) -> None:
        self.state = state
        self.monitor.set_ready(False)


def _metadata(served: Served, config: ServerConfig) -> PolicyMetadata:
    shortest = min(robot.chunk_length for robot in served.robots.values())
    longest = min(served.max_prefix if config.max_prefix is None else config.max_prefix, shortest)
    return PolicyMetadata(
        robots={
            name: replace(robot, max_prefix=min(longest, robot.chunk_length - 1))
            for name, robot in served.robots.items()
        },
        action_width=served.action_width,
        state_width=served.state_width,
        prefix_range=(0, longest),
        max_message_bytes=config.max_message_bytes,
        max_image_pixels=config.max_image_pixels,
        max_requests_per_s=config.max_requests_per_s,
    )
