"""Clients: what they need, how they lose a server and find it again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from tests.serve.support import EchoEngine, backend, observation
from tests.support import ROOT
from xr0_engine import Client
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.worker import EngineThread

GO = observation(0.25, instruction="Go.")

# What `pip install xr0-engine` brings no more than; the engine's own packages and the server's must not be missed.
WITHOUT_EXTRAS = """
import sys
for name in ("torch", "triton", "prometheus_client", "ray", "transformers", "huggingface_hub"):
    sys.modules[name] = None
import numpy as np
from xr0_engine import Client, Observation
with Client(sys.argv[1]) as client:
    robot = client.metadata.robot("libero_all")
    images = {view: np.zeros((8, 8, 3), np.uint8) for view in robot.views}
    chunk = client.infer(Observation(images, "Go.", np.full(32, 0.25, np.float32), "libero_all"))
print(chunk.actions.shape, chunk.actions[0, 0])
"""


def echo_server(port: int) -> tuple[subprocess.Popen[str], int]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.echo_server", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return process, int(process.stdout.readline())


def test_client_runs_without_torch():
    with BackgroundServer(backend(EchoEngine())) as server:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_EXTRAS, server.url], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
    assert (done.stdout, done.stderr) == ("(10, 32) 0.25\n", "")


def test_client_finds_a_server_that_was_killed():
    process, port = echo_server(0)
    with Client(f"localhost:{port}") as client:
        client.infer(GO)
        process.kill()
        process.wait()
        process.stdout.close()
        start = time.monotonic()
        with pytest.raises(ConnectionError):
            client.infer(GO)
        with pytest.raises(ConnectionError):
            client.infer(GO)
        # A control loop that asks must not be held up by a server that is not there.
        assert time.monotonic() - start < 1
        assert not client.connected
        process, _ = echo_server(port)
        while not client.connected:
            assert time.monotonic() - start < 20
            time.sleep(0.01)
        assert client.infer(GO).actions[0, 0] == 0.25
        process.kill()
        process.wait()
        process.stdout.close()


def test_client_takes_no_other_policy_for_the_old_one():
    config = ServerConfig(port=0)
    with BackgroundServer(backend(EchoEngine()), config) as server:
        client = Client(server.url)
    again = ServerConfig(port=server.port)
    with client, BackgroundServer(EngineThread(EchoEngine, (32, 32), "bimanual"), again):
        deadline = time.monotonic() + 10
        while True:
            with pytest.raises(ConnectionError) as lost:
                client.infer(GO)
            if "another policy" in str(lost.value):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_reply_that_does_not_come_is_a_lost_connection():
    engine = EchoEngine(gate=threading.Semaphore(0))
    with BackgroundServer(backend(engine)) as server, Client(server.url, timeout_s=0.2) as client:
        with pytest.raises(ConnectionError, match=r"no reply within 0\.2 s"):
            client.infer(GO)
        engine.gate.release()


def test_closed_client_says_so():
    with BackgroundServer(backend(EchoEngine())) as server:
        client = Client(server.url)
        client.close()
        client.close()
    with pytest.raises(ConnectionError, match="the client is closed"):
        client.infer(GO)


def test_nobody_there():
    with pytest.raises(ConnectionError, match="cannot connect"):
        Client("localhost:1", timeout_s=0.2)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param({"url": "http://localhost:8000"}, "url: expected ws://host:port", id="scheme"),
        pytest.param({"url": "ws://"}, "url: expected ws://host:port", id="no host"),
        pytest.param({"url": "localhost", "timeout_s": 0}, "timeout_s: expected", id="timeout"),
        pytest.param({"url": "localhost", "jpeg_quality": 100}, "jpeg_quality: expected 1 to 95", id="quality"),
        pytest.param({"url": "localhost", "jpeg_quality": 90.0}, "jpeg_quality: expected 1 to 95", id="real quality"),
        pytest.param({"url": "ws://localhost", "ca_file": __file__}, "ca_file: expected a wss:// url", id="no TLS"),
        pytest.param({"url": "wss://localhost", "ca_file": "/nowhere.pem"}, "in PEM, got /nowhere.pem", id="no file"),
        pytest.param({"url": "wss://localhost", "ca_file": __file__}, "ca_file: expected certificates", id="no PEM"),
    ],
)
def test_wrong_argument_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        Client(**arguments)
