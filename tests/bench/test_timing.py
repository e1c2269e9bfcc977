"""Taking turns, and what an interruption leaves; time itself is injected."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from xr0_engine.bench import timing
from xr0_engine.bench.timing import CallTimer, Stopwatch, check_boundary, ratio_with_spread, run, take_turns


class Rivals:
    """Rivals a and b that report how many calls there have been, as milliseconds."""

    def __init__(self, interrupt_at: int | None = None, reason: BaseException | None = None) -> None:
        self.order: list[str] = []
        self.interrupt_at, self.reason = interrupt_at, reason
        self.calls = {name: lambda name=name: self.call(name) for name in ("a", "b")}

    def call(self, name: str) -> dict[str, float]:
        if len(self.order) == self.interrupt_at:
            raise self.reason
        self.order.append(name)
        return {"flow": 1.0, "total": float(len(self.order))}


def test_rivals_take_turns_and_warm_up_is_left_out():
    rivals = Rivals()
    done = []
    samples = take_turns(rivals.calls, rounds=2, warm_up=1, done=lambda: done.append(1))
    assert "".join(rivals.order) == "baabba"
    assert len(done) == 6
    assert samples["a"]["total"].tolist() == [3, 6]
    assert samples["b"]["total"].tolist() == [4, 5]
    assert samples["a"]["flow"].tolist() == [1, 1]


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=["Ctrl-C", "error"])
def test_interruption_leaves_the_finished_rounds(reason):
    # One round of warm-up, two finished rounds, and one call of the third.
    reasons = []
    samples = take_turns(Rivals(7, reason).calls, rounds=5, warm_up=1, stopped=reasons.append)
    assert reasons == [reason]
    assert [len(times) for stages in samples.values() for times in stages.values()] == [2, 2, 2, 2]


def test_interruption_goes_on_where_nothing_was_finished():
    for interrupt_at in (0, 2, 3):
        with pytest.raises(KeyboardInterrupt):
            take_turns(Rivals(interrupt_at, KeyboardInterrupt()).calls, rounds=5, warm_up=1, stopped=lambda _: None)


def test_interruption_goes_on_where_nobody_asks():
    with pytest.raises(KeyboardInterrupt):
        take_turns(Rivals(6, KeyboardInterrupt()).calls, rounds=5, warm_up=1)


def test_run_gives_the_series_of_a_result():
    series, reason = run(Rivals().calls, rounds=2, warm_up=1)
    assert reason is None
    assert series["a"] == {"flow": [1.0, 1.0], "total": [3.0, 6.0]}
    _, reason = run(Rivals(7, KeyboardInterrupt()).calls, rounds=5, warm_up=1)
    assert isinstance(reason, KeyboardInterrupt)


@pytest.mark.parametrize(("rounds", "warm_up"), [(0, 1), (-1, 0), (1, -1)])
def test_wrong_numbers_are_refused(rounds, warm_up):
    with pytest.raises(ValueError, match="rounds, warm_up: expected at least 1 and 0"):
        take_turns(Rivals().calls, rounds, warm_up)


def test_ratio_pairs_the_rounds():
    # A machine that slows down threefold does not change the ratio.
    drift = np.array([1.0, 1.5, 2.0, 3.0])
    assert ratio_with_spread(2 * drift, drift) == (2, 2, 2)


@pytest.fixture
def ticks(monkeypatch):
    """perf_counter that steps through the given seconds."""
    readings: list[float] = []
    monkeypatch.setattr(time, "perf_counter", lambda: readings.pop(0))
    return readings


def test_call_timer_on_a_cpu_is_the_wall_clock(ticks):
    ticks += [10.0, 10.25]
    called = []
    assert CallTimer(torch.device("cpu"))(lambda: called.append(1)) == 250
    assert called == [1]


def test_stopwatch_adds_up(ticks):
    ticks += [1.0, 1.5, 3.5]
    clock = Stopwatch(torch.device("cpu"))
    clock.mark("vision")
    clock.mark("flow")
    assert clock.times() == {"vision": 500, "flow": 2000, "total": 2500}


def test_possible_boundary_is_returned():
    assert check_boundary("infer", ("stage", "infer")) == "infer"


def test_unknown_boundary_is_refused():
    with pytest.raises(ValueError, match="boundary: expected one of stage, infer"):
        check_boundary("moon", ("stage", "infer"))


def test_peak_memory_of_a_process_grows_only():
    device = torch.device("cpu")
    before = timing.peak_memory_bytes(device)
    block = np.ones(2**23)
    assert timing.peak_memory_bytes(device) >= before > block.nbytes // 2


@pytest.mark.gpu
def test_call_timer_on_a_gpu_waits_for_the_call():
    device = torch.device("cuda")
    x = torch.ones(4096, 4096, device=device)
    assert CallTimer(device)(lambda: x @ x) > 0
