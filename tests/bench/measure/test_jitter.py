"""The control loop, on a clock of our own."""

from __future__ import annotations

import pytest

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.measure import jitter
from xr0_engine.bench.measure.jitter import beat

PERIOD_MS = 100.0


class World:
    """A clock that moves when somebody sleeps or works. oversleep_s: by how much a sleep is too long."""

    def __init__(self, work_ms: list[float], oversleep_s: float = 0.0) -> None:
        self.now, self.work_ms, self.oversleep_s = 5.0, list(work_ms), oversleep_s

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep_s

    def call(self) -> None:
        if not self.work_ms:
            raise KeyboardInterrupt
        self.now += self.work_ms.pop(0) / 1000

    def run(self, ticks: int, **options) -> jitter.Beat:
        return beat(self.call, 1000 / PERIOD_MS, ticks, self.clock, self.sleep, **options)


@pytest.mark.parametrize(
    ("work_ms", "ticks", "ran", "skipped", "missed"),
    [
        pytest.param([20, 30, 90], 3, 3, 0, 0, id="in time"),
        # The second starts on the third tick, since its own has passed.
        pytest.param([120, 10], 3, 2, 1, 2, id="one over"),
        pytest.param([250, 10], 4, 2, 2, 3, id="long one"),
        pytest.param([150], 1, 1, 0, 1, id="last one over"),
        pytest.param([450], 3, 1, 2, 3, id="over the end"),
    ],
)
def test_ticks_that_pass_are_missed_and_not_caught_up(work_ms, ticks, ran, skipped, missed):
    loop = World(work_ms).run(ticks)
    assert loop.duration_ms == pytest.approx(work_ms)
    assert (len(loop.duration_ms), loop.skipped, loop.missed(1000 / PERIOD_MS)) == (ran, skipped, missed)
    assert loop.lateness_ms == pytest.approx([0] * ran, abs=1e-6)


def test_late_wake_up_counts_towards_the_deadline():
    loop = World([95, 95], oversleep_s=0.01).run(2)
    # The first tick needs no sleep; the second starts 10 ms late and ends 5 ms past its time.
    assert loop.lateness_ms == pytest.approx([0, 10])
    assert loop.missed(1000 / PERIOD_MS) == 1


def test_interruption_leaves_the_finished_ticks():
    reasons = []
    loop = World([20, 20]).run(9, stopped=reasons.append)
    assert loop.duration_ms == pytest.approx([20, 20])
    assert isinstance(reasons[0], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        World([]).run(9, stopped=reasons.append)
    with pytest.raises(KeyboardInterrupt):
        World([20]).run(9)


@pytest.mark.parametrize(
    ("rate", "seconds", "message"),
    [(0, 1, "rate: expected"), (float("nan"), 1, "rate: expected"), (30, 0, "seconds: expected"), (1, 1e6, "seconds")],
)
def test_wrong_rate_or_duration_is_refused(rate, seconds, message):
    with pytest.raises(ValueError, match=message):
        jitter.measure(Setup(CASES["libero"], "tiny", device="cpu"), rate, seconds, "")


def test_engine_in_the_loop(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XR0_CACHE", str(tmp_path))
    setup = Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=1)
    result, reason = jitter.measure(setup, 2.0, 1.0, "typed")
    assert reason is None
    assert (result.kind, result.complete, result.facts["ticks"]) == ("jitter", True, 2)
    assert len(result.series["engine"]["total"]) == len(result.series["engine"]["lateness"])
    jitter.show(result)
    assert f"{result.facts['missed_deadlines']} of 2 deadlines missed" in capsys.readouterr().out
