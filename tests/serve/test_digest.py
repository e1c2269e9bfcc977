"""A byte that changes on its way: the robot is told nothing that the server did not mean for it."""

from __future__ import annotations

import asyncio
import struct
import zlib

import numpy as np
import pytest
from websockets.sync.client import connect

from tests.serve.support import EchoEngine, backend, observation, wait_until
from xr0_engine import AsyncClient, Client
from xr0_engine.serve import connection
from xr0_engine.serve.protocol import DIGEST, DIGESTED_BYTES, Refused, Request, check_digest, decode_reply, exchanged
from xr0_engine.serve.requests import MAX_INSTRUCTION_LENGTH, encode_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.wire import pack, unpack_map
from xr0_engine.types import Guide

GO = observation(0.25, instruction="Go.")


@pytest.fixture(scope="module")
def server():
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        yield server


@pytest.fixture
def exchange(server):
    """Greeting, request, reply."""
    with connect(server.url, compression=None) as raw:
        greeting, request = raw.recv(), encode_request(Request(GO, id=1))
        raw.send(request)
        return greeting, request, raw.recv()


def crc(*messages):
    return zlib.crc32(b"".join(messages))


def test_reply_ends_with_the_digest_of_all_before_it(exchange):
    *before, reply = exchange
    assert list(unpack_map(reply))[-1] == DIGEST
    greeting, request = before
    assert reply[-4:] == struct.pack(">I", crc(greeting, request[-DIGESTED_BYTES:], reply[:-4]))


def test_all_but_images_is_at_the_end_of_a_request():
    longest = observation(0.25, size=(480, 640), instruction="\U0001f916" * MAX_INSTRUCTION_LENGTH)
    guide = Guide(np.zeros((60, 32), np.float32), 4)
    message = encode_request(Request(longest, seed=2**62 - 1, id=2**62 - 1, guide=guide))
    assert message[-DIGESTED_BYTES:].index(b"prompt") > 0


@pytest.mark.parametrize("part", [0, 1, 2], ids=["greeting", "request", "reply"])
def test_any_byte_that_changed_is_noticed(exchange, part):
    rng = np.random.default_rng(0)
    for place in (*rng.integers(0, len(exchange[part]), 200), len(exchange[part]) - 1):
        damaged = [bytearray(message) for message in exchange]
        damaged[part][place] ^= 1 << int(rng.integers(8))
        greeting, request, reply = map(bytes, damaged)
        try:
            read = decode_reply(reply)
        except ValueError:
            continue
        if part == 2 and read.digest is None:
            # The name of the field was hit: test_digest_that_is_missing.
            continue
        with pytest.raises(ValueError, match="damaged on its way"):
            check_digest(read, reply, exchanged(crc(greeting), request))


def test_clients_without_numbers_get_no_digest(server):
    with connect(server.url, compression=None) as raw:
        raw.recv()
        raw.send(encode_request(Request(GO)))
        assert DIGEST not in unpack_map(raw.recv())


def replies_with(monkeypatch, change):
    """The server's replies, changed behind the digest."""
    encode = connection.encode_chunk
    monkeypatch.setattr(connection, "encode_chunk", lambda *arguments: change(encode(*arguments)))


def action_changed(reply):
    """Another first action: as float32, 0.25 is 0x3e800000."""
    place = reply.index(struct.pack("<f", 0.25))
    return reply[: place + 3] + b"\x3f" + reply[place + 4 :]


def without_digest(reply):
    fields = unpack_map(reply)
    del fields[DIGEST]
    return pack(fields)


def test_an_action_that_changed_loses_the_connection_not_the_robot(server, monkeypatch):
    with Client(server.url) as client:
        assert client.infer(GO).actions[0, 0] == 0.25
        with monkeypatch.context() as patch:
            replies_with(patch, action_changed)
            with pytest.raises(ConnectionError, match="damaged on its way"):
                client.infer(GO)
        wait_until(lambda: client.connected)
        assert client.infer(GO).actions[0, 0] == 0.25


def test_a_state_that_changed_is_no_state_to_act_on(server, monkeypatch):
    """The server sees another one than the client sent."""
    with Client(server.url) as client:
        connection = client._connection
        send = connection.send
        state = GO.state.tobytes()
        monkeypatch.setattr(connection, "send", lambda message: send(message.replace(state, state[:-1] + b"\x41")))
        with pytest.raises(ConnectionError, match="damaged on its way"):
            client.infer(GO)


def test_asyncio_refuses_it_too(server, monkeypatch):
    async def run():
        async with AsyncClient(server.url) as client:
            assert (await client.infer(GO)).actions[0, 0] == 0.25
            with monkeypatch.context() as patch:
                replies_with(patch, action_changed)
                with pytest.raises(ConnectionError, match="damaged on its way"):
                    await client.infer(GO)
                assert "damaged on its way" in client.last_error

    asyncio.run(run())


def test_a_digest_that_is_missing_is_taken_from_servers_that_never_sent_one(server, monkeypatch):
    with Client(server.url) as client:
        with monkeypatch.context() as patch:
            replies_with(patch, without_digest)
            assert client.infer(GO).actions[0, 0] == 0.25
        assert client.infer(GO).actions[0, 0] == 0.25
        with monkeypatch.context() as patch:
            replies_with(patch, without_digest)
            with pytest.raises(ConnectionError, match="damaged on its way"):
                client.infer(GO)


def test_errors_need_none(server):
    with Client(server.url) as client:
        client.infer(GO)
        with pytest.raises(Refused, match="expected another"):
            client.infer(observation(0.25, instruction="Refuse me."))
        assert client.infer(GO).actions[0, 0] == 0.25
