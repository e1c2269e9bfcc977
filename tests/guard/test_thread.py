"""The guard beside a loop: nobody waits for it."""

from __future__ import annotations

import threading

import numpy as np

from tests.guard.support import EVERY, RATE_HZ, chunk, observation, profile, states, targets
from tests.serve.support import wait_until
from xr0_engine.guard import Guard, GuardThread
from xr0_engine.guard.thread import GuardInLoop

DARK = np.zeros((48, 64, 3), np.uint8)


class SlowGuard(Guard):
    def __init__(self):
        self.kinds = []
        super().__init__(profile(), lambda item: self.kinds.append(type(item).__name__))
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


def test_a_slow_guard_leaves_out_the_oldest_with_its_chunk():
    guard = SlowGuard()
    thread = GuardThread(guard)
    path = states(1000)

    def hand_over(number):
        tick = number * EVERY
        thread.see(observation(path[tick]), tick / RATE_HZ)
        thread.plan(chunk(targets(path, tick), 0.2))

    guard.gate.release()
    hand_over(0)
    wait_until(lambda: len(guard.kinds) == 2)
    guard.begun.clear()
    hand_over(1)
    assert guard.begun.wait(10)
    for number in range(2, 9):
        hand_over(number)
    assert thread.poll() == []
    assert thread.skipped == 3
    for _ in range(5):
        guard.gate.release()
    thread.close(10)
    assert guard.times == [tick * EVERY / RATE_HZ for tick in (0, 1, 5, 6, 7, 8)]
    # Neither is a chunk held against another's observation, nor the robot against a chunk that it left long ago.
    assert thread.poll() == []
    # The second one's chunk was left out with the third observation.
    assert guard.kinds == ["Seen", "Planned", "Seen", *["Seen", "Planned"] * 4]


def test_an_error_is_the_last_warning():
    def keep(item):
        raise OSError("No space left on device")

    thread = GuardThread(Guard(profile(), keep), stops=True)
    for tick in range(3):
        thread.see(observation([0, 0, 0.3], front=DARK), float(tick))
    thread.close(10)
    (warning,) = thread.poll()
    assert (warning.name, warning.detail) == ("failed", "the guard looks no more: OSError: No space left on device")
    in_loop = GuardInLoop(Guard(profile(), keep))
    for tick in range(3):
        in_loop.see(observation([0, 0, 0.3]), float(tick))
    assert [warning.name for warning in in_loop.poll()] == ["failed"]
