"""What a good client notices of an attack: python -m tests.serve.attack [SECONDS] [NAME ...].

A server of the echo engine, a client that sends two JPEG views of 640 x 480 at 30 Hz and asks /healthz, and one attack
after the other, each in a process of its own for SECONDS, all on this machine. It prints a table, and as its last line
the same as JSON; exit 1 if a request of the good client or a health check was not answered.
"""

from __future__ import annotations

import io
import json
import pickle
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import websockets.exceptions
import websockets.sync.client
from PIL import Image

from tests.robot.test_picture_cost import PNG, chunk, many_scans, with_chunks
from tests.serve.support import EchoEngine, backend, make_certificate, observation
from tests.serve.test_legacy import REQUEST, free_port
from xr0_engine import Client
from xr0_engine.cli.serve import run
from xr0_engine.serve.access import tls_context
from xr0_engine.serve.server import Server
from xr0_engine.serve.service import ServerConfig
from xr0_engine.serve.wire import pack

# Not from tests.support, which takes torch along: that takes seconds in each process.
ROOT = Path(__file__).resolve().parents[2]
KEY = "correct-horse"
RATE_HZ = 30.0
INFERENCE_S = 0.005
CROWD = 70
LARGEST_SIDE = 2048


class Target:
    """The server as an attacker sees it."""

    def __init__(self, port: int, legacy_port: int, is_tls: bool) -> None:
        self.port = port
        self.legacy_port = legacy_port
        self.is_tls = is_tls

    def socket(self, port: int | None = None) -> socket.socket:
        return socket.create_connection(("127.0.0.1", port or self.port), timeout=1)

    def client(self) -> websockets.sync.client.ClientConnection:
        """One with a key, greeted."""
        context = ssl._create_unverified_context() if self.is_tls else None
        scheme = "wss" if self.is_tls else "ws"
        headers = {"Authorization": f"Api-Key {KEY}"}
        connecting = websockets.sync.client.connect(
            f"{scheme}://localhost:{self.port}",
            additional_headers=headers,
            compression=None,
            max_size=None,
            ssl=context,
        )
        connection = connecting.__enter__()
        connection.recv(5)
        return connection


def crowd(target: Target, head: bytes, port: int | None = None) -> Callable[[], None]:
    """Keeps so many connections that have sent no more than that."""
    held: list[socket.socket] = []

    def step() -> None:
        for one in list(held):
            one.settimeout(0)
            with suppress(BlockingIOError):
                with suppress(ConnectionError):
                    if one.recv(1):
                        continue
                held.remove(one)
                one.close()
        while len(held) < CROWD:
            one = target.socket(port)
            held.append(one)
            one.sendall(head)
        time.sleep(0.01)

    return step


def senders(target: Target, messages: list[bytes], leave: bool) -> Callable[[], None]:
    """Clients with a key that send these; leave: and go at once, to come again."""
    clients = [] if leave else [target.client() for _ in messages]

    def step() -> None:
        for number, message in enumerate(messages):
            client = target.client() if leave else clients[number]
            client.send(message)
            if leave:
                time.sleep(0.02)
                client.socket.close()
            else:
                with suppress(TimeoutError):
                    client.recv(0.2)

    return step


def picture_request(picture: bytes) -> bytes:
    images = {"base": picture, "left_wrist": picture}
    return pack(
        {"images": images, "prompt": "x", "state": np.zeros(32, np.float32), "robot_type": "libero_all", "id": 1}
    )


def largest_picture() -> bytes:
    """As many pixels and scans as are taken."""
    file = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 60, (LARGEST_SIDE, LARGEST_SIDE, 3), dtype=np.uint8))
    image.save(file, "JPEG", quality=70, progressive=True)
    return file.getvalue()


def wrong_keys(target: Target) -> Callable[[], None]:
    def step() -> None:
        with ExitStack() as stack:
            for number in range(20):
                one = stack.enter_context(target.socket())
                one.sendall(
                    b"GET /status.json HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %08d\r\n\r\n" % number
                )
            time.sleep(0.05)

    return step


def released(target: Target) -> Callable[[], None]:
    """Requests in the released protocol, whose senders do not wait for the answer."""
    payload = pickle.dumps(REQUEST)

    def step() -> None:
        for _ in range(6):
            with target.socket(target.legacy_port) as one:
                one.sendall(struct.pack(">I", len(payload)) + payload)
                time.sleep(0.005)

    return step


MAPS = [[{} for _ in range(500)] for _ in range(100)]
ATTACKS: dict[str, tuple[bool, Callable[[Target], Callable[[], None]]]] = {
    "quiet": (False, lambda target: lambda: time.sleep(0.1)),
    "quiet, TLS": (True, lambda target: lambda: time.sleep(0.1)),
    "idle connections": (False, lambda target: crowd(target, b"GET / HT")),
    "idle connections, TLS": (True, lambda target: crowd(target, b"\x16\x03\x01\x02\x00\x01")),
    "idle connections, released port": (False, lambda target: crowd(target, b"\0\0", target.legacy_port)),
    "announced messages, released port": (False, lambda target: crowd(target, b"\0\xff\0\0.", target.legacy_port)),
    "abandoned requests, released port": (False, released),
    "scan bombs": (False, lambda target: senders(target, [picture_request(many_scans(7000, 2048))] * 6, leave=True)),
    "scan bombs, TLS": (
        True,
        lambda target: senders(target, [picture_request(many_scans(7000, 2048))] * 6, leave=True),
    ),
    "PNG chunk bombs": (
        False,
        lambda target: senders(target, [picture_request(with_chunks(chunk(b"IDAT", b"") * 80_000))] * 6, leave=True),
    ),
    "largest pictures": (False, lambda target: senders(target, [picture_request(largest_picture())] * 6, leave=False)),
    "largest pictures, abandoned": (
        False,
        lambda target: senders(target, [picture_request(largest_picture())] * 6, leave=True),
    ),
    "broken pictures": (False, lambda target: senders(target, [picture_request(PNG[:80])] * 6, leave=False)),
    "messages slow to read": (False, lambda target: senders(target, [pack({"images": MAPS})] * 6, leave=False)),
    "wrong keys": (False, wrong_keys),
}


def attack(target: Target) -> None:
    """The attacker: of each line of its input, a name and seconds, it says when it has begun and when it is done."""
    for line in sys.stdin:
        seconds, name = line.strip().split(maxsplit=1)
        step = ATTACKS[name][1](target)
        end = time.monotonic() + float(seconds)
        print("begun", flush=True)
        while time.monotonic() < end:
            # The server turns away whom it can: that is no reason to stop.
            with suppress(OSError, EOFError, websockets.exceptions.WebSocketException):
                step()
        del step
        print("done", flush=True)


@contextmanager
def process(*arguments: object):
    command = [sys.executable, "-m", "tests.serve.attack", *map(str, arguments)]
    pipe = subprocess.PIPE
    started = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()
        started.stdin.close()
        started.stdout.close()


def measure(url: str, port: int, certificate: Path | None, seconds: float) -> dict[str, float]:
    """What a good client sees: milliseconds of its requests, and what was not answered."""
    # Two views of a camera's size, with something to see.
    ramp = np.linspace(0, 255, 640).astype(np.uint8)
    asked = observation(0.25, size=(480, 640), instruction="Go.")
    frame = np.broadcast_to(ramp[None, :, None], (480, 640, 3)).copy()
    asked = type(asked)(dict.fromkeys(asked.images, frame), "Go.", asked.state, "libero_all")
    context = ssl.create_default_context(cafile=certificate) if certificate else None
    scheme = "https" if certificate else "http"
    took: list[float] = []
    lost = unhealthy = checks = 0
    with Client(url, KEY, jpeg_quality=90, ca_file=certificate, timeout_s=5) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            start = time.perf_counter()
            try:
                client.infer(asked)
                took.append(1e3 * (time.perf_counter() - start))
            except (OSError, RuntimeError):
                lost += 1
            if len(took) % 15 == 0:
                checks += 1
                try:
                    urllib.request.urlopen(f"{scheme}://localhost:{port}/healthz", timeout=2, context=context).read()
                except OSError:
                    unhealthy += 1
            time.sleep(max(0, 1 / RATE_HZ - (time.perf_counter() - start)))
    p50, p99 = np.percentile(took, [50, 99]) if took else (float("nan"), float("nan"))
    counted = {"answered": len(took), "lost": lost, "health_checks": checks, "unhealthy": unhealthy}
    return {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1), **counted}


def serve(port: int, legacy_port: int, folder: str) -> None:
    # Before anybody waits: the released protocol's replies are tensors.
    import torch

    assert torch.__version__
    tls = tls_context(Path(folder) / "cert.pem", Path(folder) / "key.pem") if folder else None
    config = ServerConfig(
        port=port, keys=(KEY,), tls=tls, legacy_port=legacy_port, allow_anyone=True, max_requests_per_s=200.0
    )
    run(Server(backend(EchoEngine(INFERENCE_S)), config), announce=lambda port: print(port, flush=True))


def main(seconds: float, names: list[str]) -> dict[str, dict[str, float]]:
    """One row per attack."""
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        certificate, _ = make_certificate(Path(folder))
        targets, attackers = {}, {}
        for is_tls in sorted({ATTACKS[name][0] for name in names}):
            legacy_port = free_port()
            server = stack.enter_context(process("--serve", 0, legacy_port, folder if is_tls else ""))
            targets[is_tls] = target = Target(int(server.stdout.readline()), legacy_port, is_tls)
            attackers[is_tls] = stack.enter_context(process("--attack", target.port, legacy_port, int(is_tls)))
        print(f"{'attack':36} {'p50 ms':>8} {'p99 ms':>8} {'answered':>9} {'lost':>5} {'/healthz':>9}", flush=True)
        for name in names:
            is_tls = ATTACKS[name][0]
            target, attacker = targets[is_tls], attackers[is_tls]
            print(seconds + 1, name, file=attacker.stdin, flush=True)
            attacker.stdout.readline()
            url = f"{'wss' if is_tls else 'ws'}://localhost:{target.port}"
            row = rows[name] = measure(url, target.port, certificate if is_tls else None, seconds)
            attacker.stdout.readline()
            health = f"{row['health_checks'] - row['unhealthy']}/{row['health_checks']}"
            print(
                f"{name:36} {row['p50_ms']:8} {row['p99_ms']:8} {row['answered']:9} {row['lost']:5} {health:>9}",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    kind, *rest = sys.argv[1:] or ["5"]
    if kind == "--serve":
        serve(int(rest[0]), int(rest[1]), rest[2])
    elif kind == "--attack":
        attack(Target(int(rest[0]), int(rest[1]), rest[2] == "1"))
    else:
        found = main(float(kind), rest or list(ATTACKS))
        print(json.dumps(found))
        sys.exit(any(row["lost"] or row["unhealthy"] for row in found.values()))
