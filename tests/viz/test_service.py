"""A server's requests in rerun, and `xr0 serve --rerun`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.serve.support import LENGTHS, WIDTH, EchoEngine, backend, observation, wait_until
from tests.viz.support import read, series
from xr0_engine import Client
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.serve.protocol import Request
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig
from xr0_engine.viz import ServiceView, service, sink

# For a process to start on a busy machine.
PATIENCE_S = 90
# A chunk's numbers are float32.
CLOSE = 1e-6


def test_requests_are_read_back(tmp_path):
    path = tmp_path / "served.rrd"
    view = ServiceView(path, "a test")
    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0), view) as server:
        with Client(server.url) as client:
            client.infer(observation(0.25, instruction="Go."))
            client.infer(observation(0.5, instruction="Go."), prefix=np.full((2, 32), 7, np.float32))
        with Client(server.url) as client:
            client.infer(observation(0.75, robot_type="bimanual", instruction="Fold."))
    assert view.dropped == 0
    rows = read(path)
    assert len(rows["/client/1/camera/left_wrist"]) == 2
    assert [row["text"] for row in rows["/client/1/said"]] == [["Go."]]
    np.testing.assert_allclose(series(rows, "/client/1/state/columns")[1][:, 0], [0.25, 0.5])
    # The columns that libero_all uses are 7.
    plans = [series(rows, f"/client/1/plan/{place}/columns")[1] for place in (0, 1)]
    for plan, first in zip(plans, (0.25, 7), strict=True):
        assert plan.shape == (11, 7)
        assert plan[0, 0] == first
        assert np.isnan(plan[-1]).all()
    np.testing.assert_array_equal(series(rows, "/client/1/prefix/columns")[1], np.full((2, 7), 7.0))
    times_s, total_ms = series(rows, "/client/1/timing/total_ms")
    assert (total_ms > 0).all()
    assert len(times_s) == 2
    # Of another layout.
    assert [row["text"] for row in rows["/client/2/said"]] == [["Fold."]]
    used = [column for column in BIMANUAL.columns if column.group == "left position"]
    plan = series(rows, "/client/2/plan/0/left_position")[1]
    assert plan.shape == (31, len(used))
    np.testing.assert_allclose(plan[:-1, 0], 0.75, atol=CLOSE)


@pytest.fixture
def arranged(monkeypatch):
    """The tabs of each arrangement that was sent. Nothing is dropped."""
    sent = []

    def send(stream, whole):
        sent.append([tab.name for tab in whole.contents])

    monkeypatch.setattr(service, "send_blueprint", send)
    monkeypatch.setattr(sink, "MOST_PICTURES", 1000)
    return sent


def answer(view, client, robot_type="libero_all"):
    engine = EchoEngine()
    asked = observation(0.25, robot_type=robot_type, size=(8, 8), instruction="Go.")
    robot = engine.embodiment(robot_type).robot_info(LENGTHS[robot_type], WIDTH, 6)
    view.answered(client, Request(asked), engine.infer(asked), {"total_ms": 1.0}, robot)


def test_it_is_arranged_once_for_each_client_however_many_ask(tmp_path, arranged):
    view = ServiceView(tmp_path / "served.rrd", "a test")
    for _ in range(5):
        for client in range(1, 11):
            answer(view, client)
    view.close()
    newest = [range(max(1, client - service.MOST_TABS + 1), client + 1) for client in range(1, 11)]
    assert arranged == [[f"client {number}, libero_all" for number in numbers] for numbers in newest]
    rows = read(tmp_path / "served.rrd")
    for client in range(1, 11):
        assert len(rows[f"/client/{client}/camera/base"]) == 5
        # As nothing of it was forgotten.
        assert len(rows[f"/client/{client}/said"]) == 1


def test_a_client_that_is_another_robot_each_time_has_a_page_of_each(tmp_path, arranged):
    view = ServiceView(tmp_path / "served.rrd", "a test")
    for number in range(6):
        answer(view, 1, ("libero_all", "bimanual")[number % 2])
    view.close()
    assert arranged == [["client 1, libero_all"], ["client 1, libero_all", "client 1, bimanual"]]


def test_who_has_gone_is_shown_until_others_come(tmp_path, arranged):
    view = ServiceView(tmp_path / "served.rrd", "a test")
    pages = view._sink._write.__self__
    for client in range(1, 31):
        answer(view, client)
        if client != 5:
            view.left(client)
    # It asked for nothing.
    view.left(31)
    view.close()
    assert len(arranged) == 30
    assert arranged[-1] == [f"client {number}, libero_all" for number in range(25, 31)]
    assert sorted(pages._clients) == [5, *range(25, 31)]


def test_the_server_tells_who_has_gone():
    class Watching:
        answers, gone = [], []

        def answered(self, client, *told):
            self.answers.append(client)

        def left(self, client):
            self.gone.append((client, len(self.answers)))

        def close(self): ...

    with BackgroundServer(backend(EchoEngine()), ServerConfig(port=0), Watching()) as server:
        for _ in range(2):
            with Client(server.url) as client:
                client.infer(observation(0.25, instruction="Go."))
        wait_until(lambda: len(Watching.gone) == 2)
    assert Watching.gone == [(1, 1), (2, 2)]


def test_serve_writes_it_until_it_is_told_to_end(tmp_path):
    init_checkpoint(tmp_path / "tiny", "tiny")
    path = tmp_path / "served.rrd"
    command = ["-m", "xr0_engine", "serve", tmp_path / "tiny", "--port", "0", "--device", "cpu", "--rerun", path]
    options = ["--robot-type", "libero_all", "--image-size", "64x64"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, *command, *options], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        url = server.stdout.readline().split()[2].rstrip(",")
        # It greets when it is warm, which may take a busy machine longer than a client waits.
        with Client(url, timeout_s=PATIENCE_S) as client:
            client.infer(observation(0.25, size=(64, 64), instruction="Go."))
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=30) == 0
    finally:
        server.kill()
        server.wait()
    rows = read(path)
    assert len(rows["/client/1/camera/base"]) == 1
    assert series(rows, "/client/1/plan/0/columns")[1].shape[1] == 7
