"""The guard beside a loop: nobody waits for it."""

from __future__ import annotations

import threading

import numpy as np

from tests.guard.support import chunk, observation, profile, states, targets
from xr0_engine.guard import Guard, GuardThread

DARK = np.zeros((48, 64, 3), np.uint8)


class SlowGuard(Guard):
    def __init__(self):
        super().__init__(profile())
        self.gate, self.begun, self.times = threading.Semaphore(0), threading.Event(), []

    def see(self, observation, time_s):
        self.begun.set()
        self.gate.acquire()
        self.times.append(time_s)
        return super().see(observation, time_s)


def test_warnings_come_by_themselves():
    thread = GuardThread(Guard(profile()))
    path = states(1000)
    thread.see(observation(path[0], front=DARK), 0.0)
    thread.plan(chunk(targets(path, 0), 0.2))
    thread.close(10)
    assert "brightness front" in [warning.name for warning in thread.poll()]
    assert thread.poll() == []
    assert thread.skipped == 0


def test_a_slow_guard_leaves_out_the_oldest():
    guard = SlowGuard()
    thread = GuardThread(guard)
    thread.see(observation([0, 0, 0.3]), 0.0)
    assert guard.begun.wait(10)
    for number in range(1, 10):
        thread.see(observation([0, 0, 0.3]), float(number))
    assert thread.poll() == []
    assert thread.skipped == 5
    for _ in range(5):
        guard.gate.release()
    thread.close(10)
    assert guard.times == [0.0, 6.0, 7.0, 8.0, 9.0]
