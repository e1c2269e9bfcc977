"""A server of the echo engine as a process of its own, to be killed: python -m tests.serve.echo_server PORT [KIND].

hang: its inferences never end. marked: its actions tell what they answer.
"""

from __future__ import annotations

import sys
import threading

from tests.serve.marked import MarkedEngine
from tests.serve.support import EchoEngine, backend
from xr0_engine.cli.serve import run
from xr0_engine.serve.server import Server
from xr0_engine.serve.service import ServerConfig

DRAIN_S = 3.0
MARKED_S = 0.2
"""An inference, so that some of those who are killed are at work."""

if __name__ == "__main__":
    gate = threading.Semaphore(0) if "hang" in sys.argv else None
    engine = MarkedEngine(MARKED_S) if "marked" in sys.argv else EchoEngine(gate=gate)
    server = Server(backend(engine), ServerConfig(port=int(sys.argv[1]), drain_s=DRAIN_S))
    run(server, announce=lambda port: print(port, flush=True))
