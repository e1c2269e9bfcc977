"""Engines that hang or die: the server says so, and ends when it is told to."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http import HTTPStatus
from operator import length_hint
from types import SimpleNamespace

import pytest

from tests.serve.echo_server import DRAIN_S, UNHEALTHY_S
from tests.serve.support import EchoEngine, backend, observation, wait_until
from tests.serve.test_server import get
from tests.support import ROOT
from xr0_engine import Client
from xr0_engine.serve import service
from xr0_engine.serve.protocol import PolicyFailed, Request
from xr0_engine.serve.replicas import RayOptions, RayReplicas
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import FAILURES_UNTIL_UNHEALTHY, ServerConfig

GO = observation(0.25, instruction="Go.")
PATIENCE_S = 60.0
"""For a process to start on a busy machine."""
SLACK_S = 5.0
"""For a process to be scheduled and waited for on one."""


def asking(client: Client) -> threading.Thread:
    def ask() -> None:
        with pytest.raises((ConnectionError, PolicyFailed)):
            client.infer(GO)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_inference_that_takes_too_long_shows_in_health():
    engine = EchoEngine(gate=threading.Semaphore(0))
    config = ServerConfig(port=0, max_inference_s=0.2)
    with BackgroundServer(backend(engine), config) as server, Client(server.url) as client:
        answered = threading.Thread(target=lambda: client.infer(GO))
        answered.start()
        wait_until(lambda: engine.seen)
        wait_until(lambda: get(server, "/healthz")[0] == 503)
        assert get(server, "/healthz")[1].endswith("s so far, expected at most 0.2 s")
        engine.gate.release()
        answered.join()
        assert get(server, "/healthz") == (200, "ok")


class Dying(EchoEngine):
    def infer(self, observation, prefix=None, *, seed=None):
        if observation.instruction == "Die.":
            raise SystemExit("out of luck")
        return super().infer(observation, prefix, seed=seed)


class DyingAhead(Dying):
    infers_ahead = True

    def infer_all(self, calls):
        for call in calls:
            if call is not None:
                yield self.infer(call.observation, call.prefix, seed=call.seed)


@pytest.mark.parametrize("engine", [Dying, DyingAhead])
def test_thread_that_has_died_shows_in_health(engine):
    with BackgroundServer(backend(engine()), ServerConfig(port=0)) as server, Client(server.url) as client:
        with pytest.raises(PolicyFailed, match="the engine's thread has died: SystemExit"):
            client.infer(observation(instruction="Die."))
        wait_until(lambda: get(server, "/healthz") == (503, "the engine's thread has died: SystemExit('out of luck')"))
        # Nobody waits for it.
        with pytest.raises(PolicyFailed, match="the engine's thread has died"):
            client.infer(GO)


@pytest.mark.parametrize("what", ["asked", "asked and left", "idle"])
def test_sigterm_ends_it_in_time_whatever_its_threads_do(what):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.echo_server", "0", "hang"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        client = Client(f"localhost:{process.stdout.readline().strip()}", timeout_s=PATIENCE_S)
        thread = None
        if what != "idle":
            thread = asking(client)
            # It is with the engine once the next is not answered either.
            time.sleep(0.5)
        if what != "asked":
            client.close()
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait(DRAIN_S + SLACK_S)
        assert time.monotonic() - start < DRAIN_S + SLACK_S
        if thread is not None:
            thread.join()
        client.close()
        assert status == (0 if what == "idle" else 1)
        assert ("the process ends without it" in process.stderr.read()) == (what != "idle")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_second_signal_ends_it_at_once():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.echo_server", "0", "hang"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        with Client(f"localhost:{process.stdout.readline().strip()}", timeout_s=PATIENCE_S) as client:
            thread = asking(client)
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == -signal.SIGTERM
            thread.join()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_closing_does_not_wait_for_an_engine_that_hangs():
    engine = EchoEngine(gate=threading.Semaphore(0))
    server = BackgroundServer(backend(engine), ServerConfig(port=0, drain_s=0.5))
    server.__enter__()
    with Client(server.url) as client:
        thread = asking(client)
        wait_until(lambda: engine.seen)
        start = time.monotonic()
        server.__exit__(None, None, None)
        assert time.monotonic() - start < SLACK_S
        thread.join()
    engine.gate.release()


@contextmanager
def watched(*kinds):
    """(process, where it serves)"""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.echo_server", "0", "watched", *kinds],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, f"localhost:{process.stdout.readline().strip()}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("hang", "s so far, expected at most 0.2 s"),
        ("fail", "inferences failed"),
        ("die", "the engine's thread has died: SystemExit('out of luck')"),
    ],
)
def test_one_that_stays_unhealthy_ends_by_itself(kind, fault):
    with watched(kind) as (process, url), Client(url, timeout_s=PATIENCE_S) as client:
        threads = [asking(client) for _ in range(FAILURES_UNTIL_UNHEALTHY if kind == "fail" else 1)]
        assert process.wait(PATIENCE_S) == 1
        told = process.stderr.read()
        for thread in threads:
            thread.join()
    assert f"unhealthy for {UNHEALTHY_S} s, so it ends: " in told
    assert fault in told


def test_one_that_is_healthy_does_not():
    with watched() as (process, url), Client(url, timeout_s=PATIENCE_S) as client:
        client.infer(GO)
        time.sleep(2 * UNHEALTHY_S)
        client.infer(GO)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0


def test_unhealthy_for_long_is_without_a_break_and_when_it_should_serve(monkeypatch):
    monkeypatch.setattr(service, "HEALTH_S", 0.0)
    ok, fault = (HTTPStatus.OK, "ok"), (HTTPStatus.SERVICE_UNAVAILABLE, "broken")
    looks = [("warming up", fault)] * 9 + [("ready", fault)] * 3 + [("ready", ok)] + [("ready", fault)] * 9
    served = service.Service(backend(EchoEngine()), ServerConfig(port=0))
    left = iter(looks)

    def health():
        served.state, told = next(left)
        return told

    monkeypatch.setattr(served, "health", health)
    # A look a second.
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: float(-length_hint(left))))

    async def wait():
        return await served.until_unhealthy(6.0)

    told = asyncio.run(wait())
    assert (told, len(list(left))) == ("broken", 2)


class Handle:
    """What Ray Serve gives for a deployment, as far as it is asked; its answers never come."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.infer = self

    def remote(self, request):
        return Answer(self)


class Answer:
    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __await__(self):
        return asyncio.get_running_loop().create_future().__await__()

    def cancel(self) -> None:
        self._handle.cancelled += 1


def test_replicas_that_hang_show_in_health_and_are_told_that_nobody_waits():
    pytest.importorskip("ray", reason="needs ray: pip install 'xr0-engine[ray]'")

    async def run() -> None:
        replicas = RayReplicas(EchoEngine, RayOptions())
        replicas._handle = handle = Handle()
        asked = asyncio.create_task(replicas.infer(Request(GO)))
        await asyncio.sleep(0.05)
        assert replicas.fault(10.0) is None
        assert replicas.fault(0.01).endswith("expected at most 0.01 s")
        asked.cancel()
        await asyncio.wait([asked])
        assert handle.cancelled == 1
        assert replicas.fault(0.0) is None

    asyncio.run(run())
