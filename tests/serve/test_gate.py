"""Connections that say nothing, by the hundred: whoever has something to say gets in, on every port."""

from __future__ import annotations

import pickle
import socket
import struct
import time
import urllib.request
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.serve.support import EchoEngine, backend, make_certificate, observation, wait_until
from tests.serve.test_legacy import REQUEST, ReleasedClient, free_port
from xr0_engine import Client
from xr0_engine.serve import server as server_module
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.gate import WAITING, WAITING_PER_ADDRESS, group_of
from xr0_engine.serve.server import MAX_HEAD_BYTES, BackgroundServer
from xr0_engine.serve.service import ServerConfig

GO = observation(0.25, instruction="Go.")
KEY = "correct-horse"
CROWD = WAITING_PER_ADDRESS + 36


@contextmanager
def serving(**config):
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, **config)) as server:
        yield server


@contextmanager
def crowd(port: int, count: int = CROWD, head: bytes = b"", source: str = "127.0.0.1"):
    """Connections that send as much and then nothing."""
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", port), 5, (source, 0)))
            with suppress(OSError):
                one.sendall(head)
            sockets.append(one)
        yield sockets


def is_open(one: socket.socket) -> bool:
    one.settimeout(0)
    try:
        return one.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def healthz(server: BackgroundServer) -> str:
    with urllib.request.urlopen(f"http://localhost:{server.port}/healthz", timeout=5) as answer:
        return answer.read().decode()


@pytest.mark.parametrize("head", [b"", b"GET / HT"], ids=["silent", "half a line"])
def test_crowd_without_a_key_keeps_nobody_out(head):
    with serving(keys=(KEY,), max_clients=2) as server, crowd(server.port, head=head) as sockets:
        for _ in range(3):
            with Client(server.url, KEY) as client:
                assert client.infer(GO).actions[0, 0] == 0.25
            assert healthz(server) == "ok"
        # The oldest went, for the newest.
        wait_until(lambda: not is_open(sockets[0]))
        assert server.server.monitor.results["too_many_connections"] >= CROWD - WAITING_PER_ADDRESS


@pytest.mark.parametrize("head", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["silent", "half a hello"])
def test_crowd_before_tls_keeps_nobody_out(head, tmp_path):
    certificate, key = make_certificate(tmp_path)
    with serving(tls=tls_context(certificate, key), max_clients=2) as server, crowd(server.port, head=head):
        for _ in range(3):
            with Client(server.url, ca_file=certificate) as client:
                assert client.infer(GO).actions[0, 0] == 0.25


@pytest.mark.parametrize("head", [b"", struct.pack(">I", 1 << 19) + bytes(100)], ids=["silent", "half a message"])
def test_crowd_on_the_released_port_takes_no_places(head):
    port = free_port()
    with serving(legacy_port=port, max_clients=2, max_message_bytes=1 << 20) as server, crowd(port, head=head):
        released = ReleasedClient(port)
        released.send(pickle.dumps(REQUEST))
        assert released.receive().shape == (1, 10, 32)
        with Client(server.url) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
        released.send(pickle.dumps(REQUEST))
        assert released.receive().shape == (1, 10, 32)
        released.socket.close()


def test_clients_without_keys_take_no_places_of_those_with_one():
    port = free_port()
    with serving(legacy_port=port, keys=(KEY,), allow_anyone=True, max_clients=2) as server:
        released = [ReleasedClient(port) for _ in range(3)]
        for client in released[:2]:
            client.send(pickle.dumps(REQUEST))
            assert client.receive().shape == (1, 10, 32)
        released[2].send(pickle.dumps(REQUEST))
        assert released[2].is_turned_away()
        with Client(server.url, KEY) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
        for client in released:
            client.socket.close()


@pytest.mark.parametrize("host", ["localhost", "", "127.0.0.1"])
def test_every_address_of_a_name_is_listened_on(host):
    with serving(host=host, allow_anyone=True) as server, Client(f"127.0.0.1:{server.port}") as client:
        assert client.infer(GO).actions[0, 0] == 0.25


def test_messages_that_were_only_announced_are_few():
    port = free_port()
    head = struct.pack(">I", 1 << 20) + bytes(10)
    with serving(legacy_port=port, max_message_bytes=1 << 20), crowd(port, 6, head) as sockets:
        wait_until(lambda: [is_open(one) for one in sockets] == [False, False, True, True, True, True])


def test_one_address_is_not_in_the_way_of_another():
    with (
        serving(max_clients=2) as server,
        crowd(server.port, 1) as (quiet,),
        crowd(server.port, CROWD, source="127.0.0.2"),
        crowd(server.port, CROWD, source="127.0.0.3"),
    ):
        assert healthz(server) == "ok"
        assert is_open(quiet)


def test_many_addresses_share_what_there_is():
    sources = [f"127.0.1.{number}" for number in range(1, 6)]
    with serving(max_clients=2) as server, ExitStack() as stack:
        sockets = []
        for source in sources:
            sockets += stack.enter_context(crowd(server.port, WAITING_PER_ADDRESS, source=source))
        with Client(server.url) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
        wait_until(lambda: sum(map(is_open, sockets)) <= WAITING)


def test_who_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(server_module, "HANDSHAKE_S", 0.3)
    with serving() as server, crowd(server.port, 1) as (slow,):
        start = time.monotonic()
        while is_open(slow):
            assert time.monotonic() - start < 10
            with suppress(OSError):
                slow.send(b"G")
            time.sleep(0.02)


def test_endless_head_is_cut_off():
    with serving() as server, crowd(server.port, 1, b"GET / HTTP/1.1\r\n") as (endless,):
        line = b"X-More: " + b"x" * 4000 + b"\r\n"
        with suppress(OSError):
            for _ in range(2 * MAX_HEAD_BYTES // len(line)):
                endless.sendall(line)
        wait_until(lambda: not is_open(endless))
        assert healthz(server) == "ok"


def test_places_are_free_again():
    with serving(max_clients=2) as server:
        for _ in range(3):
            with crowd(server.port):
                pass
        wait_until(lambda: not server.server.gate._waiting)
        for _ in range(4):
            with Client(server.url) as client:
                client.infer(GO)


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("192.168.0.7", "192.168.0.7"),
        ("::ffff:192.168.0.7", "192.168.0.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("?", "?"),
    ],
)
def test_whose_an_address_is(address, group):
    assert group_of(address) == group
