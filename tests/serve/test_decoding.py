"""Decoding that takes long holds up nobody else, and nobody takes more of it than a share."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from websockets.sync.client import connect

from tests.robot.test_picture_cost import JPEG, many_scans
from tests.serve.support import EchoEngine, backend, observation, wait_until
from xr0_engine import Client
from xr0_engine.serve import connection as connection_module
from xr0_engine.serve import decoding
from xr0_engine.serve.decoding import LIGHT_PIXELS, Allowance, DecodeAllowance, Decoder
from xr0_engine.serve.images import encode_jpeg
from xr0_engine.serve.protocol import Busy, Refused, Request
from xr0_engine.serve.requests import encode_request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

GO = observation(0.25, instruction="Go.")
HEAVY = LIGHT_PIXELS + 1


@pytest.fixture
def decoder():
    decoder = Decoder()
    yield decoder
    decoder.close()


async def begun(event: threading.Event) -> None:
    await asyncio.to_thread(event.wait, 10)


def test_light_work_does_not_wait_for_heavy_work(decoder):
    async def run() -> None:
        inside, release = threading.Event(), threading.Event()

        def heavy() -> str:
            inside.set()
            return "heavy" if release.wait(10) else "late"

        working = asyncio.create_task(decoder.run(heavy, HEAVY, DecodeAllowance()))
        await begun(inside)
        more = asyncio.create_task(decoder.run(lambda: "more", HEAVY, DecodeAllowance()))
        assert await decoder.run(lambda: "light", 1, DecodeAllowance()) == "light"
        assert not more.done()
        release.set()
        assert [await working, await more] == ["heavy", "more"]

    asyncio.run(run())


def test_the_cheapest_is_next(decoder):
    async def run() -> list[int]:
        inside, release, order = threading.Semaphore(0), threading.Event(), []

        def block() -> None:
            inside.release()
            release.wait(10)

        blocking = [asyncio.create_task(decoder.run(block, pixels, DecodeAllowance())) for pixels in (1, 1)]
        for _ in blocking:
            await asyncio.to_thread(inside.acquire)
        costs = (3 * HEAVY, 50, 2 * HEAVY, 40, 60)
        waiting = [
            asyncio.create_task(decoder.run(lambda cost=cost: order.append(cost), cost, DecodeAllowance()))
            for cost in costs
        ]
        await asyncio.sleep(0)
        release.set()
        await asyncio.gather(*blocking, *waiting)
        return order

    order = asyncio.run(run())
    assert [cost for cost in order if cost <= LIGHT_PIXELS] == sorted((40, 50, 60))
    assert order.index(2 * HEAVY) < order.index(3 * HEAVY)


def test_what_was_cancelled_is_never_begun_and_errors_come_through(decoder):
    async def run() -> None:
        inside, release, ran = threading.Event(), threading.Event(), []
        working = asyncio.create_task(decoder.run(lambda: (inside.set(), release.wait(10)), HEAVY, DecodeAllowance()))
        await begun(inside)
        gone = asyncio.create_task(decoder.run(lambda: ran.append(1), HEAVY, DecodeAllowance()))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        release.set()
        await working
        with pytest.raises(ValueError, match="no picture"):
            await decoder.run(lambda: int("no picture"), HEAVY, DecodeAllowance())
        assert ran == []

    asyncio.run(run())


def test_allowance_comes_back_with_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    allowance = Allowance(rate=2.0, most=3.0)
    assert [allowance.spend(1) for _ in range(4)] == [True, True, True, False]
    allowance.charge(4.0)
    assert (allowance.left, allowance.debt_s) == (-4.0, 2.0)
    now[0] += 2.5
    assert (allowance.left, allowance.debt_s) == (1.0, 0.0)
    now[0] += 100
    assert allowance.left == 3.0


def test_seconds_and_pixels_are_counted(decoder):
    allowance = DecodeAllowance()
    assert allowance.why_not(10 * decoding.DECODED_PIXELS_PER_S) is None
    assert "pixels per second" in allowance.why_not(1)

    slow = DecodeAllowance()
    asyncio.run(decoder.run(lambda: sum(range(2_000_000)), 1, slow))
    left = slow._seconds.left
    assert left < decoding.DECODE_BURST_S
    assert slow.why_not(1) is None
    slow.charge(decoding.DECODE_BURST_S + 1)
    assert "s of decoding per second" in slow.why_not(1)
    assert slow.debt_s > 0


def test_client_that_has_too_much_decoded_is_told_and_others_are_not(monkeypatch):
    monkeypatch.setattr(decoding, "DECODED_PIXELS_PER_S", 4000)
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        with Client(server.url, jpeg_quality=90) as greedy, Client(server.url, jpeg_quality=90) as modest:
            greedy.infer(GO)
            with pytest.raises(Busy, match="images: expected at most 4000 decoded pixels per second"):
                greedy.infer(GO)
            assert modest.infer(GO).actions[0, 0] == 0.25
        # Frames as they are cost nothing to decode.
        with Client(server.url) as raw:
            for _ in range(3):
                raw.infer(GO)


def test_pictures_of_a_client_that_has_gone_are_not_decoded(monkeypatch):
    read_request, release = connection_module.read_request, threading.Event()
    begun: list[str] = []

    def slowly(fields, metadata):
        begun.append(fields["prompt"])
        assert release.wait(20)
        return read_request(fields, metadata)

    monkeypatch.setattr(connection_module, "read_request", slowly)
    files = {view: encode_jpeg(image, 90) for view, image in GO.images.items()}
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server:
        clients = []
        for number in range(4):
            client = connect(server.url, compression=None).__enter__()
            client.recv()
            client.send(encode_request(Request(replace(GO, images=files, instruction=str(number)), id=1)))
            # One after the other, and the third and fourth wait.
            wait_until(lambda number=number: len(begun) == min(number + 1, 2))
            clients.append(client)
        wait_until(lambda: len(server.server.decoder._waiting) == 2)
        clients[2].socket.close()
        wait_until(lambda: len(server.server.monitor.clients) == 3)
        release.set()
        clients[3].recv()
        for client in clients:
            client.close()
    assert sorted(begun) == ["0", "1", "3"]


def test_messages_that_take_long_to_read_hold_up_their_sender_alone():
    from xr0_engine.serve.wire import pack

    # As many small maps as a message may hold.
    message = pack({"id": 1, "images": [[{} for _ in range(500)] for _ in range(100)]})
    with (
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server,
        Client(server.url) as client,
        connect(server.url, compression=None, max_queue=None) as busy,
    ):
        busy.recv()
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                busy.send(message)
                busy.recv()

        flooding = threading.Thread(target=flood)
        flooding.start()
        took = []
        for _ in range(11):
            start = time.perf_counter()
            client.infer(GO)
            took.append(time.perf_counter() - start)
        stop.set()
        flooding.join()
    assert sorted(took)[5] < 0.5


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    decoded = []
    monkeypatch.setattr("xr0_engine.serve.requests.read_image", lambda *arguments: decoded.append(arguments))
    asked = observation(0.25, instruction="Go.")
    bomb = type(asked)({"base": many_scans(10_000), "left_wrist": JPEG}, "Go.", asked.state, "libero_all")
    with (
        BackgroundServer(backend(EchoEngine()), ServerConfig(port=0)) as server,
        Client(server.url) as client,
        pytest.raises(Refused, match="image 'base': expected a JPEG of at most 32 scans, got 10000"),
    ):
        client.infer(bomb)
    assert decoded == []
