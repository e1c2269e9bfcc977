"""A server of the echo engine as a process of its own, to be killed: python -m tests.serve.echo_server PORT [KIND ...].

hang: its inferences never end. fail: they do, with an error. die: the first one ends the engine's thread. marked: its
actions tell what they answer. watched: it ends when it has been unhealthy for UNHEALTHY_S.
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
LONG_S, UNHEALTHY_S = 0.2, 0.5
"""Watched: what an inference may take, and for how long it may be unhealthy."""
MANY = 1000
MARKED_S = 0.2
"""An inference, so that some of those who are killed are at work."""

if __name__ == "__main__":
    gate = threading.Semaphore(0) if "hang" in sys.argv else None
    engine = MarkedEngine(MARKED_S) if "marked" in sys.argv else EchoEngine(gate=gate)
    if "fail" in sys.argv:
        engine.broken = [RuntimeError("the GPU has fallen off the bus")] * MANY
    elif "die" in sys.argv:
        engine.broken = [SystemExit("out of luck")]
    limits = {"max_inference_s": LONG_S, "max_unhealthy_s": UNHEALTHY_S} if "watched" in sys.argv else {}
    server = Server(backend(engine), ServerConfig(port=int(sys.argv[1]), drain_s=DRAIN_S, **limits))
    run(server, announce=lambda port: print(port, flush=True))
