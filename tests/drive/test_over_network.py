"""The executor with a real client and a real server process: killed in the middle of a chunk, and started again."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np

from tests.executor.support import assert_adds_up
from tests.support import ROOT
from xr0_engine.drive.null import NullRobot
from xr0_engine.drive.policies import from_server
from xr0_engine.executor import Executor, Settings, SystemClock

# Starting Python on a busy machine.
PATIENCE_S = 60.0


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
            assert (source.layout, source.control_rate_hz, source.max_prefix) == ("bimanual", 30, 6)
            robot = KeepingRobot(source.views, source.layout, source.robot_type, 32, 32, (32, 32))
            executor = Executor(source.policy, robot, robot.frame, Settings(30, retry_s=0.05), clock=SystemClock())
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
