"""The server over real sockets, with an engine that only echoes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.serve.support import EchoEngine, backend, make_certificate, observation, wait_until
from xr0_engine import AsyncClient, Client
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.protocol import Busy, PolicyFailed, Refused, Superseded
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.worker import EngineThread

GO = observation(0.25, instruction="Go.", timestamp_s=8.0)
KEY = "correct-horse"


@contextmanager
def serving(engine: EchoEngine | None = None, **config):
    with BackgroundServer(backend(engine or EchoEngine()), ServerConfig(port=0, **config)) as server:
        yield server


def get(server: BackgroundServer, path: str, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(f"http://localhost:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_chunk_comes_back():
    engine = EchoEngine()
    with serving(engine) as server, Client(server.url) as client:
        chunk = client.infer(GO, prefix=np.full((2, 32), 7, np.float32), seed=9)
    assert chunk.actions.shape == (10, 32)
    assert chunk.actions[:, 0].tolist() == [7, 7, *[0.25] * 8]
    assert chunk.actions[5, -1] == 9
    assert (chunk.robot_type, chunk.prefix_length, chunk.timestamp_s) == ("libero_all", 2, 8.0)
    assert {"flow", "total", "queue", "server", "round_trip"} == set(chunk.timing_ms)
    np.testing.assert_array_equal(engine.seen[0].images["left_wrist"], GO.images["left_wrist"])
    assert len(engine.threads) == 1
    assert threading.get_ident() not in engine.threads


def test_metadata_tells_how_to_drive():
    with serving() as server, Client(server.url) as client:
        metadata = client.metadata
    assert (metadata.robot_types, metadata.action_width, metadata.state_width) == (("libero_all", "bimanual"), 32, 32)
    bimanual = metadata.robot("bimanual")
    assert (bimanual.chunk_length, bimanual.control_rate_hz, bimanual.layout) == (30, 30.0, "bimanual")
    assert bimanual.views == ("ego", "left_wrist", "right_wrist")
    assert metadata.prefix_range == (0, 6)


@pytest.mark.parametrize(("trained", "asked", "longest"), [(4, None, 4), (4, 2, 2), (0, None, 0), (20, None, 10)])
def test_prefixes_are_as_long_as_the_engine_was_trained_for(trained, asked, longest):
    engine = EchoEngine()
    engine.max_prefix = trained
    with serving(engine, max_prefix=asked) as server, Client(server.url) as client:
        assert client.metadata.prefix_range == (0, longest)
        client.infer(GO, prefix=np.zeros((longest, 32), np.float32))
        with pytest.raises(Refused, match=f"prefix: expected 0 to {longest} actions"):
            client.infer(GO, prefix=np.zeros((longest + 1, 32), np.float32))


def test_asyncio_client():
    async def infer(url: str):
        async with AsyncClient(url) as client:
            return [await client.infer(replace(GO, timestamp_s=float(count))) for count in range(3)]

    with serving() as server:
        chunks = asyncio.run(infer(server.url))
    assert [chunk.timestamp_s for chunk in chunks] == [0.0, 1.0, 2.0]


# Its way to connect is on its way out of websockets.
@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")
def test_openpi_client_connects_unchanged():
    request = {
        "observation/image": GO.images["base"],
        "observation/wrist_image": GO.images["left_wrist"],
        "observation/state": GO.state,
        "prompt": "Go.",
        "robot_type": "libero_all",
    }
    with serving(keys=(KEY,)) as server:
        client = WebsocketClientPolicy("localhost", server.port, api_key=KEY)
        assert client.get_server_metadata()["robots"]["libero_all"]["chunk_length"] == 10
        with pytest.raises(RuntimeError, match="refused: prompt: expected text, got nothing"):
            client.infer({name: value for name, value in request.items() if name != "prompt"})
        reply = client.infer(request)
        client._ws.close()
    assert reply["actions"].shape == (10, 32)
    assert reply["actions"][0, 0] == 0.25
    assert reply["server_timing"]["infer_ms"] > 0


def test_prepared_images_stay_so_on_the_way():
    engine = EchoEngine()

    async def infer(url: str):
        async with AsyncClient(url) as client:
            await client.infer(replace(GO, prepared=True))

    with serving(engine) as server:
        with Client(server.url) as client:
            client.infer(GO)
            client.infer(replace(GO, prepared=True))
        asyncio.run(infer(server.url))
    assert [seen.prepared for seen in engine.seen] == [False, True, True]


def test_either_client_refuses_a_frame_before_it_is_sent():
    grey = replace(GO, images={view: image[..., 0] for view, image in GO.images.items()})

    async def infer(url: str):
        async with AsyncClient(url, jpeg_quality=90) as client:
            with pytest.raises(Refused, match=r"image 'base': .*a grey image"):
                await client.infer(grey)
            return await client.infer(GO)

    engine = EchoEngine()
    with serving(engine) as server:
        assert asyncio.run(infer(server.url)).actions[0, 0] == 0.25
        with (
            Client(server.url, jpeg_quality=90) as client,
            pytest.raises(Refused, match=r"image 'base': .*a grey image"),
        ):
            client.infer(grey)
    assert len(engine.seen) == 1


def test_jpeg_client_sends_less():
    smooth = np.linspace(0, 255, 256 * 256 * 3).reshape(256, 256, 3).astype(np.uint8)
    engine = EchoEngine()
    with serving(engine, max_message_bytes=100_000) as server:
        with Client(server.url, jpeg_quality=90) as client:
            client.infer(replace(GO, images={"base": smooth, "left_wrist": smooth}))
        assert engine.seen[0].images["base"].shape == (256, 256, 3)
        with Client(server.url) as client, pytest.raises(Refused, match="expected at most 100000 bytes, got 39"):
            client.infer(replace(GO, images={"base": smooth, "left_wrist": smooth}))


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), MemoryError()], ids=["RuntimeError", "MemoryError"])
def test_failed_inference_is_told_and_survived(error):
    engine = EchoEngine()
    with serving(engine) as server, Client(server.url) as client:
        engine.broken = [error]
        with pytest.raises(PolicyFailed, match=r"out of memory|MemoryError"):
            client.infer(GO)
        assert client.infer(GO).actions[0, 0] == 0.25


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_actions_that_are_not_finite_stay_here(value):
    engine = EchoEngine()
    actions = np.zeros((10, 32), np.float32)
    actions[3, 4] = value
    with serving(engine) as server, Client(server.url) as client:
        engine.broken = [actions]
        with pytest.raises(PolicyFailed, match="actions: expected finite actions"):
            client.infer(GO)
        assert client.infer(GO).actions[0, 0] == 0.25


def test_engine_refuses_and_serves_on():
    with serving() as server, Client(server.url) as client:
        with pytest.raises(Refused, match="instruction: expected another"):
            client.infer(replace(GO, instruction="Refuse me."))
        assert client.infer(GO).actions[0, 0] == 0.25


def test_device_that_is_lost_shows_in_health():
    engine = EchoEngine()
    with serving(engine) as server, Client(server.url) as client:
        engine.broken = [RuntimeError("device lost")] * 3
        for _ in range(3):
            with pytest.raises(PolicyFailed):
                client.infer(GO)
        assert get(server, "/healthz") == (503, "the last 3 inferences failed")
        client.infer(GO)
        assert get(server, "/healthz") == (200, "ok")


def test_newest_observation_wins():
    engine = EchoEngine(gate=threading.Semaphore(0))

    async def overtake(url: str):
        async with AsyncClient(url) as client:
            calls = []
            for count in range(4):
                calls.append(asyncio.create_task(client.infer(replace(GO, timestamp_s=float(count)))))
                # The first is at work before the others arrive.
                await asyncio.to_thread(wait_until, lambda: engine.seen)
            superseded = [await asyncio.gather(call, return_exceptions=True) for call in calls[1:3]]
            engine.gate.release(2)
            return superseded, [await calls[0], await calls[3]]

    with serving(engine) as server:
        superseded, answered = asyncio.run(overtake(server.url))
    assert [type(error) for (error,) in superseded] == [Superseded, Superseded]
    assert [chunk.timestamp_s for chunk in answered] == [0.0, 3.0]
    assert [seen.timestamp_s for seen in engine.seen] == [0.0, 3.0]


def test_clients_take_turns():
    engine = EchoEngine(gate=threading.Semaphore(0))

    async def flood_and_ask(url: str):
        async with AsyncClient(url) as greedy, AsyncClient(url) as modest, AsyncClient(url) as other:
            calls = []
            for client, instruction in ((greedy, "greedy"), (modest, "modest"), (other, "other")):
                calls.append(asyncio.create_task(client.infer(replace(GO, instruction=instruction))))
                await asyncio.sleep(0.05)
            # The greedy one, whose first is at work, asks again and again.
            for _ in range(20):
                calls.append(asyncio.create_task(greedy.infer(replace(GO, instruction="greedy"))))
                await asyncio.sleep(0)
            await asyncio.sleep(0.2)
            engine.gate.release(100)
            await asyncio.gather(*calls, return_exceptions=True)

    with serving(engine) as server:
        asyncio.run(flood_and_ask(server.url))
    assert [seen.instruction for seen in engine.seen] == ["greedy", "modest", "other", "greedy"]


def test_rate_is_limited_and_recovers():
    with serving(max_requests_per_s=5) as server, Client(server.url) as client:
        for _ in range(5):
            client.infer(GO)
        with pytest.raises(Busy, match="expected at most 5 requests per second"):
            client.infer(GO)
        time.sleep(0.3)
        client.infer(GO)


@pytest.mark.parametrize("key", [None, "wrong-horse-1"], ids=["missing", "wrong"])
def test_key_is_asked_for(key):
    with serving(keys=("another-key", KEY)) as server:
        with pytest.raises(PermissionError, match="HTTP 401"):
            Client(server.url, key)
        with Client(server.url, KEY) as client:
            client.infer(GO)
        for path in ("/", "/metrics", "/status.json", "/frames/1/base"):
            assert get(server, path)[0] == 401
        assert get(server, "/metrics", Authorization=f"Bearer {KEY}")[0] == 200
        assert get(server, "/healthz") == (200, "ok")


def test_web_pages_of_others_cannot_connect():
    with serving() as server:
        with pytest.raises(InvalidStatus), connect(server.url, origin="http://evil.example"):
            pass
        # A name that was made to resolve to this machine.
        assert get(server, "/frames/1/base", Host="evil.example")[0] == 403
        assert get(server, "/healthz", Host="evil.example")[0] == 200


def test_tls(tmp_path):
    certificate, key = make_certificate(tmp_path)
    with serving(tls=tls_context(certificate, key)) as server:
        with Client(server.url, ca_file=certificate) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
        with pytest.raises(ConnectionError, match="certificate"):
            Client(server.url, timeout_s=0.3)
    with pytest.raises(ValueError, match="TLS: expected a certificate and its key"):
        tls_context(certificate, None)
    with pytest.raises(ValueError, match="TLS: expected PEM files"):
        tls_context(certificate, certificate)


class SlowStart(EchoEngine):
    def __init__(self) -> None:
        super().__init__()
        self.started, self.go_on = threading.Event(), threading.Event()

    def example(self, *args, **kwargs):
        self.started.set()
        assert self.go_on.wait(10)
        return super().example(*args, **kwargs)


def test_warm_up_is_waited_for():
    engine = SlowStart()
    server = BackgroundServer(backend(engine), ServerConfig(port=0))
    entering = threading.Thread(target=server.__enter__)
    entering.start()
    assert engine.started.wait(10)
    assert get(server, "/healthz") == (503, "warming up")
    assert "xr0_ready 0.0" in get(server, "/metrics")[1]
    with pytest.raises(ConnectionError, match="no greeting"):
        Client(server.url, timeout_s=0.2)
    clients = []
    connecting = threading.Thread(target=lambda: clients.append(Client(server.url)))
    connecting.start()
    engine.go_on.set()
    connecting.join()
    entering.join()
    assert get(server, "/healthz") == (200, "ok")
    assert clients[0].infer(GO).actions[0, 0] == 0.25
    clients[0].close()
    server.__exit__(None, None, None)


def test_shutdown_answers_what_was_asked():
    engine = EchoEngine(gate=threading.Semaphore(0))
    server = BackgroundServer(backend(engine), ServerConfig(port=0))
    server.__enter__()
    with Client(server.url) as client, Client(server.url) as late:
        chunks = []
        asking = threading.Thread(target=lambda: chunks.append(client.infer(GO)))
        asking.start()
        wait_until(lambda: engine.seen)
        leaving = threading.Thread(target=lambda: server.__exit__(None, None, None))
        leaving.start()
        wait_until(lambda: server.server.draining)
        assert get(server, "/healthz") == (503, "draining")
        with pytest.raises(Busy, match="shutting down"):
            late.infer(GO)
        with pytest.raises(ConnectionError):
            Client(server.url, timeout_s=0.1)
        engine.gate.release()
        asking.join()
        leaving.join()
        assert chunks[0].actions[0, 0] == 0.25
        with pytest.raises(ConnectionError):
            late.infer(GO)


def test_engine_that_cannot_be_loaded_ends_the_server():
    def load():
        raise ValueError("checkpoint: expected a folder, got nothing")

    with pytest.raises(ValueError, match="checkpoint: expected a folder"):
        BackgroundServer(EngineThread(load), ServerConfig(port=0)).__enter__()


def test_one_robot_type_need_not_be_named():
    alone = BackgroundServer(EngineThread(EchoEngine, (32, 32), "bimanual"), ServerConfig(port=0))
    with alone as server, Client(server.url) as client:
        assert client.metadata.robot_types == ("bimanual",)
        chunk = client.infer(replace(observation(robot_type="bimanual", instruction="Go."), robot_type=None))
        assert chunk.robot_type == "bimanual"
        with pytest.raises(Refused, match="robot_type: expected one of bimanual; got 'libero_all'"):
            client.infer(GO)
    with pytest.raises(ValueError, match="robot_type: expected one of libero_all, bimanual; got 'r2d2'"):
        BackgroundServer(EngineThread(EchoEngine, (32, 32), "r2d2"), ServerConfig(port=0)).__enter__()


def test_metrics_and_status_count():
    with serving() as server, Client(server.url) as client:
        for _ in range(3):
            client.infer(GO)
        with pytest.raises(Refused):
            client.infer(replace(GO, instruction="Refuse me."))
        metrics = get(server, "/metrics")[1]
        status = json.loads(get(server, "/status.json")[1])
        code, frame = get(server, "/frames/1/base")
        for nowhere in ("/frames/1/tail", "/frames/x", "/frames/" + 5000 * "9" + "/base", "/nothing"):
            assert get(server, nowhere)[0] == 404
    for line in (
        'xr0_requests_total{result="answered"} 3.0',
        'xr0_requests_total{result="refused"} 1.0',
        "xr0_request_seconds_count 3.0",
        'xr0_stage_seconds_count{stage="flow"} 3.0',
        "xr0_clients 1.0",
        "xr0_ready 1.0",
    ):
        assert line in metrics
    assert (status["state"], status["results"]) == ("ready", {"answered": 3, "refused": 1})
    assert status["backend"] == "echo: it runs no network"
    assert sum(status["latency"]["total"]) == 3
    assert (status["clients"][0]["answered"], status["clients"][0]["errors"]) == (3, 1)
    latest = status["latest"]
    assert (latest["names"], len(latest["actions"])) == ([f"column {number}" for number in range(7)], 10)
    assert latest["views"] == {"base": [48, 64], "left_wrist": [48, 64]}
    assert (code, frame[6:10]) == (200, "JFIF")
