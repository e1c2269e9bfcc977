"""xr0 serve: a real process with a real checkpoint, from start to SIGTERM."""

from __future__ import annotations

import pickle
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from typer.testing import CliRunner

from tests.serve.test_legacy import REQUEST, ReleasedClient, free_port
from tests.support import ROOT
from xr0_engine import Client, Engine
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.cli import app

LIMIT_S = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    init_checkpoint(folder, "tiny")
    return str(folder)


def options(checkpoint: str) -> list[str]:
    return [checkpoint, "--port", "0", "--robot-type", "libero_all", "--device", "cpu", "--dtype", "float32"]


# openpi's way to connect is on its way out of websockets.
@pytest.mark.filterwarnings("ignore:connect:DeprecationWarning")
def test_openpi_and_released_clients_get_the_engine_s_chunks(checkpoint):
    legacy_port = free_port()
    command = [sys.executable, "-m", "xr0_engine", "serve", *options(checkpoint), "--image-size", "64x48"]
    command += ["--legacy-pickle", "--legacy-port", str(legacy_port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("listening on ws://127.0.0.1:")
        url = line.split()[2].rstrip(",")
        engine = Engine.from_pretrained(checkpoint, device="cpu", dtype="float32")
        asked = engine.example("libero_all", (48, 64))
        expected = engine.infer(asked, seed=3).actions

        with Client(url, timeout_s=LIMIT_S) as client:
            chunk = client.infer(asked, seed=3)
            np.testing.assert_array_equal(chunk.actions, expected)
            assert chunk.timing_ms["flow"] > 0
            prefixed = client.infer(asked, prefix=expected[:2], seed=3)
            np.testing.assert_array_equal(prefixed.actions[:2], expected[:2])

        openpi = WebsocketClientPolicy(url)
        images = {"observation/image": asked.images["base"], "observation/wrist_image": asked.images["left_wrist"]}
        said = {"prompt": asked.instruction, "seed": 3, "prepared": False}
        reply = openpi.infer({**images, "observation/state": asked.state, **said})
        np.testing.assert_array_equal(reply["actions"], expected)
        openpi._ws.close()

        released = ReleasedClient(legacy_port)
        released.send(pickle.dumps(REQUEST))
        assert tuple(released.receive().shape) == (1, 10, 32)
        released.socket.close()
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
        process.stdout.close()


@pytest.mark.parametrize(
    ("flags", "formats"),
    [
        pytest.param([], None, id="neither"),
        pytest.param(["--legacy-npz"], ("npz",), id="archives"),
        pytest.param(["--legacy-npz", "--legacy-pickle"], ("pickle", "npz"), id="both"),
    ],
)
def test_flags_open_the_released_ports(checkpoint, monkeypatch, flags, formats):
    served = []
    monkeypatch.setattr("xr0_engine.cli.serve.run", served.append)
    assert CliRunner().invoke(app, ["serve", *options(checkpoint), *flags, "--legacy-port", "4321"]).exit_code == 0
    config = served[0].config
    assert (config.legacy_port, config.legacy_formats if formats else None) == (4321 if formats else None, formats)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        pytest.param(["--host", "0.0.0.0"], "takes API keys", id="open to all"),
        pytest.param(["--image-size", "640"], "--image-size: expected WIDTHxHEIGHT", id="image size"),
        pytest.param(["--tls-cert", "cert.pem"], "TLS: expected a certificate and its key", id="half of TLS"),
        pytest.param(["--api-keys", "/nowhere/keys"], "/nowhere/keys", id="no key file"),
        pytest.param(["--robot-type", "r2d2"], "robot_type: expected one of", id="robot type"),
        pytest.param(
            ["--legacy-pickle", "--legacy-port", "65535", "--legacy-ranks", "2"],
            "legacy_ranks: expected at least 1, and ports up to 65535, got 2 from 65535 on",
            id="ranks without ports",
        ),
        pytest.param(["--ray", "--device", "cuda:1"], "device: expected auto, cpu or cuda beside --ray", id="ray"),
    ],
)
def test_mistakes_are_told_in_one_line(checkpoint, more, complaint):
    result = CliRunner().invoke(app, ["serve", *options(checkpoint), *more])
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.splitlines()[-1].startswith("xr0: error: ")


@pytest.mark.parametrize("arguments", [(), ("checkpoint", "--export", "folder")], ids=["neither", "both"])
def test_either_a_checkpoint_or_an_export_is_served(arguments):
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 2
    assert "expected one of them" in result.stderr


def test_port_in_use_is_told(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = CliRunner().invoke(app, ["serve", *options(checkpoint), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2
    assert "address already in use" in result.stderr
