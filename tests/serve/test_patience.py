"""Clients that wait: never for ever, and never the last time, whatever stands between them and their server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from tests.serve.proxy import Proxy
from tests.serve.support import EchoEngine, backend, make_certificate, observation, wait_until
from tests.support import ROOT
from xr0_engine import AsyncClient, Client
from xr0_engine.serve import connecting
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.protocol import decode_metadata, encode_metadata
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.wire import pack, unpack_map

GO = observation(0.25, instruction="Go.")
# 25 MB: more than the kernel keeps for two sockets.
LARGE = observation(0.25, size=(2048, 2048), instruction="Go.")
TIMEOUT_S = 1.0
LATE_S = 5.0
"""How much later than its deadline a busy machine may let a call return."""


class Threaded:
    """AsyncClient as a blocking client, its loop on a thread."""

    def __init__(self, *arguments, **options) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._client = AsyncClient(*arguments, **options)
        self._run(self._client.connect())

    def __getattr__(self, name: str):
        return getattr(self._client, name)

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def infer(self, observation):
        return self._run(self._client.infer(observation))

    def close(self) -> None:
        self._run(self._client.close())

    def __enter__(self) -> Threaded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


KINDS = pytest.mark.parametrize("kind", [Client, Threaded], ids=["blocking", "asyncio"])


@contextmanager
def between(tls=None):
    """A server and a proxy before it."""
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, tls=tls)) as server, Proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def impatient(monkeypatch):
    """Pauses that a test can wait for."""
    monkeypatch.setattr(connecting, "SLOW_PAUSE_S", 0.05)
    monkeypatch.setattr(connecting, "LONGEST_PAUSE_S", 0.1)


@KINDS
@pytest.mark.parametrize("is_tls", [False, True], ids=["plain", "TLS"])
def test_sending_has_a_deadline(kind, is_tls, tmp_path, impatient):
    files = make_certificate(tmp_path) if is_tls else None
    with between(tls_context(*files) if files else None) as proxy:
        url = f"wss://localhost:{proxy.port}" if files else f"localhost:{proxy.port}"
        with kind(url, timeout_s=TIMEOUT_S, ca_file=files[0] if files else None) as client:
            client.infer(GO)
            proxy.hold()
            start = time.monotonic()
            with pytest.raises(ConnectionError, match="no reply within 1 s"):
                client.infer(LARGE)
            assert time.monotonic() - start < TIMEOUT_S + LATE_S
            proxy.go_on()
            wait_until(lambda: client.connected)
            assert client.infer(GO).actions[0, 0] == 0.25


@KINDS
def test_closing_has_a_deadline(kind):
    with between() as proxy:
        client = kind(f"localhost:{proxy.port}", timeout_s=60)
        errors = []

        def ask() -> None:
            with pytest.raises(ConnectionError) as lost:
                client.infer(LARGE)
            errors.append(lost.value)

        proxy.hold()
        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.1)
        start = time.monotonic()
        client.close()
        asking.join(10)
        assert errors
        assert time.monotonic() - start < 2 + LATE_S


@KINDS
@pytest.mark.parametrize(
    ("mode", "error", "said"),
    [
        pytest.param("403 Forbidden", PermissionError, "HTTP 403", id="403"),
        pytest.param("401 Unauthorized", PermissionError, "HTTP 401", id="401"),
        pytest.param("502 Bad Gateway", ConnectionError, "HTTP 502", id="502"),
        pytest.param("302 Found", ConnectionError, "HTTP 302", id="302"),
        pytest.param("flip", ConnectionError, "", id="garbled"),
        pytest.param("hold", ConnectionError, "", id="slow greeting"),
    ],
)
def test_it_comes_back_whatever_it_was_told(kind, mode, error, said, impatient):
    with between() as proxy, kind(f"localhost:{proxy.port}", timeout_s=TIMEOUT_S) as client:
        client.infer(GO)
        assert client.last_error is None
        proxy.mode = "pass" if mode == "hold" else mode
        proxy.cut()
        if mode == "hold":
            proxy.hold()

        def is_told() -> bool:
            try:
                client.infer(GO)
            except error as lost:
                return said in str(lost) and said in client.last_error and not client.connected
            except ConnectionError:
                return False
            return False

        wait_until(is_told)
        told = client.last_error
        # Some more attempts, each of which might be the last.
        time.sleep(0.3)
        proxy.mode = "pass"
        proxy.go_on()
        wait_until(lambda: client.connected)
        assert client.infer(GO).actions[0, 0] == 0.25
        # Why it was gone can still be asked.
        assert told
        assert client.last_error


@KINDS
def test_it_stops_trying_when_it_is_closed(kind, impatient):
    with between() as proxy:
        client = kind(f"localhost:{proxy.port}", timeout_s=TIMEOUT_S)
        proxy.mode = "403 Forbidden"
        proxy.cut()
        wait_until(lambda: client.last_error is not None or not _works(client))
        wait_until(lambda: "403" in (client.last_error or ""))
        client.close()
        proxy.mode = "pass"
        time.sleep(0.3)
        assert not client.connected
        with pytest.raises(ConnectionError, match="the client is closed"):
            client.infer(GO)


def _works(client) -> bool:
    try:
        client.infer(GO)
    except (ConnectionError, PermissionError):
        return False
    return True


@KINDS
def test_wrong_answers_end_the_first_attempt_at_once(kind):
    with between() as proxy:
        proxy.mode = "403 Forbidden"
        start = time.monotonic()
        with pytest.raises(PermissionError, match="HTTP 403"):
            kind(f"localhost:{proxy.port}", timeout_s=60)
        assert time.monotonic() - start < LATE_S


def test_threads_that_share_a_client_wait_for_their_turn_no_longer_than_that():
    with between() as proxy, Client(f"localhost:{proxy.port}", timeout_s=TIMEOUT_S) as client:
        proxy.hold()
        lost = []

        def ask() -> None:
            try:
                client.infer(GO)
            except ConnectionError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - start < 2 * TIMEOUT_S + LATE_S
        assert len(lost) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_message_bytes", "many"),
        ("action_width", 0),
        ("prefix_range", [1]),
        ("prefix_range", [0, None]),
        ("max_requests_per_s", float("nan")),
        ("state_width", True),
    ],
)
def test_greeting_of_other_kinds_is_refused(field, value):
    fields = unpack_map(encode_metadata(_metadata()))
    with pytest.raises(ValueError, match="server: expected metadata of xr0-engine"):
        decode_metadata(pack({**fields, field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("control_rate_hz", 0), ("views", []), ("views", [1]), ("chunk_length", 1.5), ("max_prefix", -1), ("layout", 3)],
)
def test_greeting_with_a_robot_of_another_kind_is_refused(field, value):
    fields = unpack_map(encode_metadata(_metadata()))
    fields["robots"]["libero_all"][field] = value
    with pytest.raises(ValueError, match="robots, 'libero_all'"):
        decode_metadata(pack(fields))


def _metadata():
    from tests.serve.fuzz import METADATA

    return METADATA


# Whoever answers here has never heard of the protocol, or damages it.
LOUD = """
import asyncio, socket, sys, threading, time
import numpy as np
from tests.serve.proxy import Proxy
from tests.serve.support import EchoEngine, backend, observation
from xr0_engine import AsyncClient, Client
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

GO = observation(0.25, instruction="Go.")

def try_to(work):
    try:
        work()
    except (ConnectionError, PermissionError, ValueError):
        return

async def ask(url):
    async with AsyncClient(url, timeout_s=0.3) as client:
        await client.infer(GO)

rng = np.random.default_rng(0)
listener = socket.create_server(("127.0.0.1", 0))

def babble():
    while True:
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        connection.sendall(rng.bytes(int(rng.integers(1, 3000))))
        connection.close()

threading.Thread(target=babble, daemon=True).start()
for _ in range(5):
    url = f"localhost:{listener.getsockname()[1]}"
    try_to(lambda: Client(url, timeout_s=0.2).infer(GO))
    try_to(lambda: asyncio.run(ask(url)))
with BackgroundServer(backend(EchoEngine())) as server, Proxy(server.port) as proxy:
    for mode in ("flip", "500 Internal Server Error", "302 Found", "pass"):
        url = f"localhost:{proxy.port}"
        proxy.mode = "pass"
        with Client(url, timeout_s=0.5) as client:
            client.infer(GO)
            proxy.mode = mode
            try_to(lambda: client.infer(GO))
            proxy.cut()
            time.sleep(0.3)
        try_to(lambda: asyncio.run(ask(url)))
print("done")
"""


def test_nothing_of_the_library_reaches_the_terminal():
    done = subprocess.run([sys.executable, "-c", LOUD], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_reply_that_comes_twice_is_passed_over():
    """As on a network that repeats: the reply before this one is none to this one."""
    from websockets.sync.server import serve

    from xr0_engine.serve.protocol import encode_chunk
    from xr0_engine.types import ActionChunk

    actions = np.zeros((10, 32), np.float32)
    chunk = ActionChunk(actions, actions, np.ones(32, bool), "libero_all")
    timing = {"infer_ms": 1.0, "queue_ms": 1.0, "total_ms": 2.0}

    def answer(connection) -> None:
        connection.send(encode_metadata(_metadata()))
        for message in connection:
            number = unpack_map(message)["id"]
            for _ in range(2):
                connection.send(encode_chunk(chunk, number, timing))

    with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"localhost:{server.socket.getsockname()[1]}") as client:
            for _ in range(3):
                assert client.infer(observation(0.25, size=(8, 8), instruction="Go.")).actions.shape == (10, 32)
        server.shutdown()
