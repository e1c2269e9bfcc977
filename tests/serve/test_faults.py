"""What clients do by mistake or by malice; the next good request is always answered."""

from __future__ import annotations

import resource
import socket
import struct
import threading
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.serve.support import EchoEngine, backend, observation, wait_until
from xr0_engine import Client
from xr0_engine.serve.protocol import Refused, Request, decode_reply
from xr0_engine.serve.requests import encode_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.wire import pack

GO = observation(0.25, instruction="Go.")
GOOD = encode_request(Request(GO, id=1))
MAX_BYTES = 1 << 20
GIGABYTE = 1 << 30


@pytest.fixture(scope="module")
def server():
    config = ServerConfig(port=0, max_message_bytes=MAX_BYTES)
    with BackgroundServer(backend(EchoEngine()), config) as server:
        yield server


@pytest.fixture
def raw(server):
    """A bare websocket, greeted."""
    with connect(server.url, compression=None) as connection:
        connection.recv()
        yield connection


def answers(connection) -> bool:
    connection.send(GOOD)
    return decode_reply(connection.recv()).chunk.actions[0, 0] == 0.25


GARBAGE = {
    "text": "give me actions",
    "empty text": "",
    "nothing": b"",
    "noise": np.random.default_rng(0).bytes(5000),
    "half a message": GOOD[: len(GOOD) // 2],
    "deep nesting": b"\x91" * 50_000,
    "4 billion items": b"\xdd\xff\xff\xff\xff",
    "list": pack([1, 2]),
    "empty map": pack({}),
    "image is a map": pack({"images": {"base": {}}, "state": 1, "prompt": "x", "robot_type": "libero_all"}),
    "prompt missing": pack({"state": [0.0] * 32, "robot_type": "libero_all"}),
}


@pytest.mark.parametrize("message", GARBAGE.values(), ids=GARBAGE)
def test_garbage_gets_an_error_and_the_connection_lives(raw, message):
    raw.send(message)
    reply = raw.recv()
    assert isinstance(reply, str)
    assert reply.startswith("refused: ")
    assert answers(raw)


def test_error_carries_the_number_of_its_request(raw):
    raw.send(pack({"id": 77, "prompt": 3}))
    reply = decode_reply(raw.recv())
    assert (reply.id, type(reply.error)) == (77, Refused)
    assert answers(raw)


def test_message_in_pieces_is_read(raw):
    raw.send([GOOD[:100], GOOD[100:5000], GOOD[5000:]])
    assert decode_reply(raw.recv()).chunk is not None


def test_client_that_vanishes_in_mid_message(server):
    with connect(server.url, compression=None) as connection:
        connection.recv()
        connection.socket.sendall(b"\x82\xfe\x10\x00" + bytes(4) + bytes(100))
        connection.socket.shutdown(socket.SHUT_RDWR)
    with Client(server.url) as client:
        client.infer(GO)


def test_who_left_before_the_answer_is_not_waited_for():
    engine = EchoEngine(gate=threading.Semaphore(0))
    with BackgroundServer(backend(engine), ServerConfig(port=0)) as server:
        with connect(server.url, compression=None) as connection:
            connection.recv()
            connection.send(GOOD)
            wait_until(lambda: engine.seen)
            wait_until(lambda: server.server.busy)
        wait_until(lambda: not server.server.monitor.clients)
        busy = set(server.server.busy)
        # The engine goes on before anything can fail: it would hold up the server's end.
        engine.gate.release()
    assert busy == set()


@pytest.mark.parametrize("sent", [0, 2 * MAX_BYTES], ids=["announced", "sent in part"])
def test_gigabyte_is_refused_before_it_is_read(server, raw, sent):
    tracemalloc.start()
    raw.socket.sendall(b"\x82\xff" + struct.pack(">Q", GIGABYTE) + bytes(4))
    with suppress(OSError):
        raw.socket.sendall(bytes(sent))
    with pytest.raises(ConnectionClosed) as closed:
        raw.recv()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert closed.value.rcvd.code == 1009
    assert peak < 16 * MAX_BYTES
    with Client(server.url) as client:
        client.infer(GO)


def test_endless_pieces_are_cut_off(server):
    with connect(server.url, compression=None) as connection:
        connection.recv()
        with pytest.raises(ConnectionClosed) as closed:
            connection.send(bytes(MAX_BYTES // 8) for _ in range(10_000))
        assert closed.value.rcvd.code == 1009


@pytest.mark.parametrize("message", [b"\xc1", GOOD], ids=["garbage", "good requests"])
def test_client_that_floods_and_never_reads_holds_nobody_up(message):
    done = threading.Event()

    def flood(connection) -> None:
        try:
            while not done.is_set():
                connection.send(message)
        except ConnectionClosed:
            pass

    with (
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server,
        connect(server.url, compression=None, max_queue=1) as greedy,
        Client(server.url) as client,
    ):
        flooding = threading.Thread(target=flood, args=(greedy,))
        flooding.start()
        for _ in range(20):
            assert client.infer(GO).actions[0, 0] == 0.25
        done.set()
        greedy.socket.shutdown(socket.SHUT_RDWR)
        flooding.join()


PING = b"\x89\x80" + bytes(4)


def test_flood_of_pings_is_cut_off(server, raw):
    with suppress(OSError):
        raw.socket.sendall(PING * 4_000_000)
    # The server itself cut it off, not the client for want of an answer.
    assert server.server.monitor.results["flooding"] == 1
    with Client(server.url) as client:
        assert client.infer(GO).actions[0, 0] == 0.25


@pytest.mark.parametrize("head", [b"", b"GET / HTTP/1.1\r\n"], ids=["silent", "half a request"])
def test_a_thousand_connections(head):
    # Both ends are in this process.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, limits[1]), limits[1]))
    engine = EchoEngine()
    with BackgroundServer(backend(engine), ServerConfig(port=0, max_clients=4)) as server:
        with Client(server.url) as client:
            sockets = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
            for one in sockets:
                one.settimeout(0)
                try:
                    one.send(head)
                except OSError:
                    # Turned away already.
                    continue
            assert client.infer(GO).actions[0, 0] == 0.25
            for one in sockets:
                one.close()
        with Client(server.url) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_clients_beyond_the_limit_are_turned_away_and_come_back():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0, max_clients=2)) as server:
        with Client(server.url) as first, Client(server.url):
            with pytest.raises(ConnectionError, match="HTTP 503: too many clients"):
                Client(server.url, timeout_s=0.1)
            assert first.infer(GO).actions[0, 0] == 0.25
        with Client(server.url) as third:
            assert third.infer(GO).actions[0, 0] == 0.25


def test_fault_of_the_server_closes_one_connection_and_no_more():
    engine = EchoEngine()
    with BackgroundServer(backend(engine), ServerConfig(port=0)) as server, Client(server.url) as other:
        with Client(server.url) as client:
            engine.broken = [TypeError("a bug in the engine")]
            with pytest.raises(ConnectionError):
                client.infer(GO)
        assert other.infer(GO).actions[0, 0] == 0.25


def test_unusable_actions_are_told_to_clients_without_numbers_too():
    engine = EchoEngine()
    with BackgroundServer(backend(engine), ServerConfig(port=0)) as server:
        engine.broken = [np.full((10, 32), np.nan, np.float32)]
        with connect(server.url, compression=None) as connection:
            connection.recv()
            connection.send(encode_request(Request(GO)))
            assert connection.recv().startswith("failed: actions: expected finite actions")
            assert answers(connection)
