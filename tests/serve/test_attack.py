"""Each attack of attack.py once: who is good is answered, and so is /healthz."""

from __future__ import annotations

import ssl
import urllib.request
from contextlib import suppress

import pytest
import websockets.exceptions

from tests.serve.attack import ATTACKS, KEY, Target
from tests.serve.support import EchoEngine, backend, make_certificate, observation
from tests.serve.test_legacy import free_port
from xr0_engine import Client
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.server import BackgroundServer
from xr0_engine.serve.service import ServerConfig

GO = observation(0.25, instruction="Go.")
# Seconds of decoding, for which `python -m tests.serve.attack` is there.
SLOW = {"largest pictures", "largest pictures, abandoned", "quiet", "quiet, TLS"}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Whether with TLS -> the server, and the file to trust."""
    certificate, key = make_certificate(tmp_path_factory.mktemp("tls"))
    config = {"port": 0, "keys": (KEY,), "allow_anyone": True}
    plain = ServerConfig(**config, legacy_port=free_port())
    secure = ServerConfig(**config, tls=tls_context(certificate, key))
    with (
        BackgroundServer(backend(EchoEngine()), plain) as first,
        BackgroundServer(backend(EchoEngine()), secure) as second,
    ):
        yield {False: (first, None), True: (second, certificate)}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in SLOW])
def test_good_client_is_answered(name, served):
    is_tls, make = ATTACKS[name]
    server, certificate = served[is_tls]
    step = make(Target(server.port, server.server.config.legacy_port, is_tls))
    for _ in range(2):
        with suppress(OSError, EOFError, websockets.exceptions.WebSocketException):
            step()
        with Client(server.url, KEY, ca_file=certificate, jpeg_quality=90) as client:
            assert client.infer(GO).actions[0, 0] == 0.25
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    url = server.url.replace("ws", "http", 1)
    with urllib.request.urlopen(f"{url}/healthz", timeout=10, context=context) as answer:
        assert answer.read() == b"ok"
