"""The executor with a real client and a real server process: in order, and killed in the middle of a chunk."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.executor.support import assert_adds_up
from tests.serve.support import EchoEngine, backend, make_certificate
from tests.support import ROOT
from xr0_engine.cli import app
from xr0_engine.drive import aloha
from xr0_engine.drive import run as drive_run
from xr0_engine.drive.null import NullRobot
from xr0_engine.drive.policies import from_server
from xr0_engine.executor import Executor, PlainFrame, Settings, SystemClock, VirtualClock, frame_for, read_recording
from xr0_engine.robot.layouts import BIMANUAL
from xr0_engine.serve import client
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

# Starting Python, or drawing frames, on a busy machine.
PATIENCE_S = 300.0
# `xr0 drive` runs until it has accepted so many.
CHUNKS = 3


class UntilChunks(Executor):
    """Ends by what has happened, not by the time that it is given, which is there to give up."""

    def run(self, seconds):
        threading.Thread(target=self._watch, daemon=True).start()
        return super().run(seconds)

    def _watch(self):
        wait_until(lambda: self.report.counts["chunks"] >= CHUNKS)
        self.end()


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """Where other work keeps the processor busy, replies and frames take seconds."""
    monkeypatch.setattr(client, "Client", partial(client.Client, timeout_s=PATIENCE_S))
    monkeypatch.setattr(aloha, "MAX_FRAME_AGE_S", PATIENCE_S)
    monkeypatch.setattr(drive_run, "SENSORS_S", PATIENCE_S)


@pytest.fixture
def until_chunks(monkeypatch):
    monkeypatch.setattr(drive_run, "Executor", UntilChunks)


@pytest.fixture(scope="module")
def served(tiny_checkpoint):
    """The address of `xr0 serve` with a tiny checkpoint."""
    command = [sys.executable, "-m", "xr0_engine", "serve", str(tiny_checkpoint), "--port", "0"]
    command += ["--robot-type", "bimanual", "--image-size", "64x64"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield server.stdout.readline().split()[2].rstrip(",")
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        server.stdout.close()


@pytest.mark.parametrize("env", ["null", "demo"])
def test_drive_against_a_server(served, env, tmp_path, request, until_chunks):
    """What `make soak` does for ten minutes, and the demo environment the same way."""
    if env == "demo":
        request.getfixturevalue("renderer")
    recording = tmp_path / "session.jsonl"
    command = ["drive", "--env", env, "--server", served, "--seconds", str(PATIENCE_S), "--record", str(recording)]
    result = CliRunner().invoke(app, [*command, "--json"])
    assert result.stdout, result.output
    report = json.loads(result.stdout)
    counts, jitter = report["counts"], report["jitter"]
    assert result.exit_code == (1 if counts["deadline_misses"] else 0)
    assert report["ended"] == "asked to"
    assert counts["chunks"] >= CHUNKS
    assert counts["failed"] == counts["rejected"] == counts["clock_jumps"] == 0
    steps = read_recording(recording).lines["step"]
    assert jitter["count"] == len(steps) > 0
    assert 0 < jitter["p50_ms"] <= jitter["p99_9_ms"] <= jitter["max_ms"]
    # However slow this machine is, no step is lost without being counted.
    assert counts["executed"] + counts["held"] == len(steps)
    assert counts["waited"] + counts["missed"] >= steps[-1]["step"] - steps[0]["step"] + 1 - len(steps)
    assert np.isfinite([line["row"] for line in steps]).all()


def test_drive_over_tls_with_a_key(tmp_path, monkeypatch, until_chunks):
    key = "drive-key-1"
    monkeypatch.setenv("XR0_API_KEY", key)
    certificate = make_certificate(tmp_path)
    config = ServerConfig(port=0, keys=(key,), tls=tls_context(*certificate))
    with BackgroundServer(backend(EchoEngine()), config) as server:
        command = ["drive", "--env", "null", "--robot-type", "bimanual", "--server", server.url]
        command += ["--seconds", str(PATIENCE_S)]
        result = CliRunner().invoke(app, [*command, "--ca-file", str(certificate[0]), "--json"])
        assert json.loads(result.stdout)["counts"]["chunks"] >= CHUNKS
        result = CliRunner().invoke(app, [*command, "--ca-file", str(certificate[0]), "--api-key", "another-key"])
        assert result.exit_code == 2
        assert "HTTP 401" in result.stderr


def test_what_a_server_says_of_a_robot_is_what_the_executor_is_held_against():
    config = ServerConfig(port=0, max_prefix=4)
    with BackgroundServer(backend(EchoEngine()), config) as server, from_server(server.url, None, "bimanual") as source:
        info = source.policy.robot_info("bimanual")
        assert (info.control_rate_hz, info.layout, info.chunk_length, info.action_width) == (30, "bimanual", 30, 32)
        assert (info.max_prefix, source.max_prefix) == (4, 4)
        libero = source.policy.robot_info("libero_all")
        assert (libero.step_columns, libero.two_valued_columns) == ((0, 1, 2, 3, 4, 5), (6,))
        robot = KeepingRobot(source.views, source.layout, source.robot_type, 32, (32, 32))

        def executor(frame, **settings):
            settings = Settings(**{"rate_hz": 30, "max_prefix": 4, **settings})
            return Executor(source.policy, robot, frame, settings, clock=VirtualClock(), delay_s=lambda _: 0.1)

        for frame, settings, complaint in (
            (source.frame, {"rate_hz": 60}, "for 30 Hz, Settings have 60"),
            (source.frame, {"max_prefix": 6}, "prefixes of up to 4 actions"),
            (PlainFrame(32), {}, "layout bimanual, the frame is of plain"),
        ):
            with pytest.raises(ValueError, match=complaint):
                executor(frame, **settings).run(1.0)
        assert robot.rows == ()
        assert executor(frame_for(info)).run(1.0).counts["executed"] > 20


def start_server(port=0):
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.echo_server", str(port)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return server, int(server.stdout.readline())


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class KeepingRobot(NullRobot):
    rows = ()

    def command(self, row):
        self.rows = (*self.rows, row)


def test_the_loop_outlives_its_server():
    server, port = start_server()
    try:
        with from_server(f"ws://127.0.0.1:{port}", None, "bimanual") as source:
            assert (source.layout, source.control_rate_hz, source.max_prefix) == (BIMANUAL, 30, 6)
            robot = KeepingRobot(source.views, source.layout, source.robot_type, 32, (32, 32))
            frame = source.layout.frame(source.action_width)
            executor = Executor(source.policy, robot, frame, Settings(30, retry_s=0.05), clock=SystemClock())
            counts = executor.report.counts
            loop = threading.Thread(target=executor.run, args=(10 * PATIENCE_S,))
            loop.start()
            try:
                wait_until(lambda: counts["chunks"] >= 3)
                server.kill()
                server.wait()
                wait_until(lambda: counts["failed"] >= 2 and counts["held"] >= 5)
                chunks, commands = counts["chunks"], len(robot.rows)
                server, _ = start_server(port)
                wait_until(lambda: counts["chunks"] >= chunks + 2)
            finally:
                executor.end()
                loop.join()
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
    assert not loop.is_alive()
    assert len(robot.rows) > commands
    assert "ConnectionError" in executor.report.last_error
    # Steps with and without a command: none is unaccounted for.
    assert counts["executed"] + counts["held"] == len(robot.rows)
    assert np.isfinite(robot.rows).all()
    assert_adds_up(executor.report)
