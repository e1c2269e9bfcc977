"""A server of the echo engine as a process of its own, to be killed: python -m tests.serve.echo_server PORT [hang].

hang: its inferences never end.
"""

from __future__ import annotations

import sys
import threading

from tests.serve.support import EchoEngine, backend
from xr0_engine.cli.serve import run
from xr0_engine.serve.server import Server
from xr0_engine.serve.service import ServerConfig

DRAIN_S = 3.0

if __name__ == "__main__":
    gate = threading.Semaphore(0) if "hang" in sys.argv else None
    server = Server(backend(EchoEngine(gate=gate)), ServerConfig(port=int(sys.argv[1]), drain_s=DRAIN_S))
    run(server, announce=lambda port: print(port, flush=True))
