"""Two servers, and all that comes, goes and breaks around them: python -m tests.serve.soak [SECONDS [SEED]].

One server is `xr0 serve` with the tiny checkpoint, and stays. An executor drives on it at 30 Hz; beside it clients come
that ask and leave: in order, without a word, in the middle of a message, before their handshake is done. The other
server's actions tell what they answer (marked.py); it is ended by SIGTERM or SIGKILL up to 20 times, and starts again.
An executor and clients reach it over a network that delays, cuts, flips and doubles what passes (proxy.py).

Held at the end: every action, step and inference of both executors is accounted for; no command was one that no policy
had meant; both executors get chunks again; memory, descriptors and threads have not grown, neither of the server that
stayed nor of this process with all its clients; that server ends by SIGTERM as it should, and has logged no traceback.
Whatever is not so is printed and makes the exit code 1. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from tests.serve.kills import ROOT, Drive, KilledServer
from tests.serve.proxy import Proxy, Trouble
from xr0_engine import Client
from xr0_engine.drive.null import NullRobot
from xr0_engine.drive.policies import Source
from xr0_engine.types import Observation

TROUBLE = 0.1
"""Of the pieces that pass, a message each or so."""
RESTARTS, BETWEEN_S = 20, 10.0
"""So many, and no more than one in this time."""
SAMPLES = 120
WARM = 0.2
"""Of the time, in which caches and pools fill."""
GROWTH = {"memory_mib": 16.0, "descriptors": 3, "threads": 3}
"""From the least of the first half of the samples to the least of the second: what is kept for good shows in both."""
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Use:
    """Of a process: resident MiB, open descriptors, threads."""

    memory_mib: float
    descriptors: int
    threads: int


def use(pid: int) -> Use:
    folder = Path(f"/proc/{pid}")
    fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    kib, threads = int(fields["VmRSS"].split()[0]), int(fields["Threads"])
    return Use(round(kib / 1024, 1), len(list((folder / "fd").iterdir())), threads)


def growth(samples: list[Use]) -> dict[str, float]:
    """By kind: from the least of the first half, once warm, to the least of the second."""
    warm = samples[int(len(samples) * WARM) :]
    first, second = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    return {
        name: round(min(getattr(it, name) for it in second) - min(getattr(it, name) for it in first), 1)
        for name in GROWTH
    }


class Visitors(threading.Thread):
    """Clients that come to a server and go, one after the other, each in a way that chance chooses. counts: by how."""

    def __init__(self, port: int, asked: Observation, seed: int) -> None:
        super().__init__(name="visitors", daemon=True)
        self.counts: Counter[str] = Counter()
        self._port, self._asked, self._chance = port, asked, random.Random(seed)
        self._done = threading.Event()

    def run(self) -> None:
        ways: tuple[Callable[[], None], ...] = (self._in_order, self._without_a_word, self._cut_off, self._half)
        while not self._done.wait(self._chance.uniform(0, 1)):
            # The network is bad and the server not always there: that is no reason not to come again.
            with suppress(OSError, EOFError, RuntimeError, ValueError, WebSocketException):
                self._chance.choice(ways)()

    def end(self) -> None:
        self._done.set()
        self.join(PATIENCE_S)

    def _in_order(self) -> None:
        with Client(f"ws://127.0.0.1:{self._port}", timeout_s=5) as client:
            client.infer(self._asked)
        self.counts["asked and closed"] += 1

    def _without_a_word(self) -> None:
        with self._socket() as raw, connect(f"ws://127.0.0.1:{self._port}", sock=raw, compression=None) as one:
            one.recv(5)
            raw.shutdown(socket.SHUT_RDWR)
        self.counts["vanished"] += 1

    def _cut_off(self) -> None:
        with self._socket() as raw, connect(f"ws://127.0.0.1:{self._port}", sock=raw, compression=None) as one:
            one.recv(5)
            raw.sendall(b"\x82\xfe\x10\x00" + bytes(4) + bytes(100))
            raw.shutdown(socket.SHUT_RDWR)
        self.counts["left in mid message"] += 1

    def _half(self) -> None:
        with self._socket() as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        self.counts["left in mid handshake"] += 1

    def _socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=5)


@contextmanager
def serve_tiny(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """`xr0 serve` with a tiny checkpoint, and its port; its log is in server.log."""
    xr0 = [sys.executable, "-m", "xr0_engine"]
    subprocess.run([*xr0, "init", "--out", str(folder / "tiny")], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    command = [*xr0, "serve", str(folder / "tiny"), "--robot-type", "bimanual", "--image-size", "64x64", "--port", "0"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().split()[2].rstrip(",").rpartition(":")[2])
        _wait_until_ready(port)
        yield server, port
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def _wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=PATIENCE_S).close()
            return
        except urllib.error.HTTPError:
            assert time.monotonic() < deadline, "the server was not ready in time"
            time.sleep(0.1)


class QuietRobot(NullRobot):
    """Stands still, and counts what it is told."""

    commands = wrong = 0

    def command(self, row: np.ndarray) -> None:
        self.commands += 1


def quiet_robot(source: Source) -> QuietRobot:
    return QuietRobot(source.views, source.layout, source.robot_type, source.state_width, (64, 64))


def restart(server: KilledServer, chance: random.Random) -> None:
    if chance.random() < 0.5:
        server.process.terminate()
        server.process.wait(PATIENCE_S)
    server.kill()
    time.sleep(chance.uniform(0, 1))
    server.start()
    server.wait_until_up()


def come_back(drive: Drive) -> bool:
    """Whether it gets a chunk once nothing stands in its way any more."""
    deadline, chunks = time.monotonic() + PATIENCE_S, drive.report.counts["chunks"]
    while drive.report.counts["chunks"] == chunks and time.monotonic() < deadline:
        time.sleep(0.01)
    return drive.report.counts["chunks"] > chunks


def soak(seconds: float, seed: int) -> dict[str, Any]:
    """Returns what was counted, and what was wrong."""
    chance, trouble = random.Random(seed), Trouble(0.0, seed)
    restarts, done = max(1, min(RESTARTS, int(seconds / BETWEEN_S))), 0
    faults: list[str] = []
    samples: dict[str, list[Use]] = {"server": [], "clients": []}
    with tempfile.TemporaryDirectory(prefix="xr0-soak-") as kept, ExitStack() as stack:
        folder = Path(kept)
        stays, port = stack.enter_context(serve_tiny(folder))
        comes = stack.enter_context(KilledServer())
        proxy = stack.enter_context(Proxy(comes.port, trouble))
        ports = {"quiet": port, "troubled": proxy.port}
        drives = {
            "quiet": stack.enter_context(Drive(f"ws://127.0.0.1:{port}", quiet_robot)),
            "troubled": stack.enter_context(Drive(f"ws://127.0.0.1:{proxy.port}")),
        }
        asked = {name: drive.robot.observe(0.0).observation for name, drive in drives.items()}
        visitors = [Visitors(at, asked[name], seed) for name, at in ports.items()]
        trouble.share = TROUBLE
        for one in visitors:
            one.start()
        begun_s = time.monotonic()
        for number in range(SAMPLES):
            samples["server"].append(use(stays.pid))
            samples["clients"].append(use(os.getpid()))
            if number >= (done + 0.5) * SAMPLES / restarts and done < restarts:
                done += 1
                restart(comes, chance)
            time.sleep(max(0.0, begun_s + (number + 1) * seconds / SAMPLES - time.monotonic()))
        for one in visitors:
            one.end()
        trouble.share = 0.0
        faults += [
            f"{name}: did not come back: {it.report.last_error}" for name, it in drives.items() if not come_back(it)
        ]
        for drive in drives.values():
            drive.end()
        stays.send_signal(signal.SIGTERM)
        code = stays.wait(PATIENCE_S)
        log = (folder / "server.log").read_text()
    if code != 0 or "Traceback" in log:
        faults.append(f"the server that stayed ended with {code}: {log[-400:]}")
    for name, drive in drives.items():
        faults += [f"{name}: {fault}" for fault in drive.faults()]
    if failed := drives["quiet"].report.counts["failed"]:
        faults.append(f"quiet: {failed} inferences failed: {drives['quiet'].report.last_error}")
    grown = {name: growth(taken) for name, taken in samples.items()}
    for name, kinds in grown.items():
        faults += [f"{name}: {kind} grew by {by}" for kind, by in kinds.items() if by > GROWTH[kind]]
    counts = {name: {kind: n for kind, n in drive.report.counts.items() if n} for name, drive in drives.items()}
    return {
        "seconds": seconds,
        "restarts": done,
        "network": dict(trouble.counts),
        "visitors": dict(visitors[0].counts + visitors[1].counts),
        "counts": counts,
        "wrong": drives["troubled"].robot.wrong,
        "last": {name: asdict(taken[-1]) for name, taken in samples.items()},
        "grown": grown,
        "faults": faults,
    }


def listed(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def show(told: dict[str, Any]) -> None:
    """The tables of docs/reliability.md, and what was wrong."""
    print(f"{told['seconds']:g} s, {told['restarts']} restarts; clients that came and went: {listed(told['visitors'])}")
    print(f"pieces that met a bad network: {listed(told['network'])}; commands that no policy meant: {told['wrong']}")
    for name, counts in told["counts"].items():
        print(f"{name}: {listed(counts)}")
    print("\n| | MiB | grown | descriptors | grown | threads | grown |\n|---|---:|---:|---:|---:|---:|---:|")
    for name, last in told["last"].items():
        cells = (f"{last[kind]} | {told['grown'][name][kind]}" for kind in GROWTH)
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nfaults: {len(told['faults'])}")
    for fault in told["faults"]:
        print(fault)


if __name__ == "__main__":
    result = soak(float(sys.argv[1]) if len(sys.argv) > 1 else 600.0, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    show(result)
    print(json.dumps(result))
    sys.exit(bool(result["faults"]))
