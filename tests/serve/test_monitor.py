"""What the page is told of clients that are there and of those that have gone."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from tests.serve.support import EchoEngine, observation
from xr0_engine.serve.monitor import Monitor
from xr0_engine.serve.worker import describe
from xr0_engine.types import TokenizedObservation

TIMING = {"queue_ms": 0.1, "infer_ms": 1.0, "total_ms": 2.0}


@pytest.fixture
def robots():
    return describe(EchoEngine(), (32, 32), None).robots


def answer(monitor, number, value=0.5, seen=None):
    shown = seen or observation(value, instruction="Go.")
    chunk = EchoEngine().infer(observation(value, instruction="Go."))
    monitor.answered(number, shown, chunk, TIMING)
    return shown


def test_who_was_answered_last_is_shown_whether_there_or_gone(robots, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    monitor = Monitor()
    assert monitor.snapshot(robots)["latest"] is None
    first, second, third = (monitor.connected("here") for _ in range(3))
    for number, value in ((first, 0.25), (second, 0.5)):
        now[0] += 1
        answer(monitor, number, value)
    now[0] += 5
    # Who never was answered leaves nothing; who went last need not have been answered last.
    for number in (second, first, third):
        monitor.disconnected(number)
    latest = monitor.snapshot(robots)["latest"]
    assert (latest["client"], latest["connected"], latest["age_s"]) == (second, False, 5.0)
    assert latest["actions"][0][0] == 0.5
    assert monitor.record(second).last_observation.instruction == "Go."
    assert monitor.record(first) is None
    fourth = monitor.connected("here")
    assert monitor.snapshot(robots)["latest"]["client"] == second
    answer(monitor, fourth)
    latest = monitor.snapshot(robots)["latest"]
    assert (latest["client"], latest["connected"]) == (fourth, True)
    assert asdict(monitor.record(fourth))["answered"] == 1


def test_one_observation_is_kept_of_all_that_have_gone(robots):
    monitor = Monitor()
    for _ in range(100):
        number = monitor.connected("here")
        answer(monitor, number)
        monitor.disconnected(number)
    kept = [number for number in range(1, 101) if monitor.record(number) is not None]
    assert len(kept) == 1
    assert not monitor.clients


def test_what_was_sent_as_tokens_has_no_views(robots):
    monitor = Monitor()
    number = monitor.connected("here")
    tokens = TokenizedObservation(
        np.zeros(3, np.int64), np.zeros((4, 8), np.float32), ((2, 2),), np.zeros(32, np.float32)
    )
    answer(monitor, number, seen=tokens)
    assert monitor.snapshot(robots)["latest"]["views"] == {}
