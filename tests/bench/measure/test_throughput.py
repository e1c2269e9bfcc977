"""Throughput: batches that give what single calls give, taking turns."""

from __future__ import annotations

import pytest

from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure import throughput


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=1)


def test_every_batch_has_its_series(setup, capsys):
    result, reason = throughput.measure(setup, [1, 3], 2, "typed")
    assert reason is None
    assert (result.kind, result.boundary, result.complete) == ("throughput", "infer", True)
    assert {name: len(stages["total"]) for name, stages in result.series.items()} == {"batch 1": 2, "batch 3": 2}
    assert result.facts["batches"] == {"batch 1": 1, "batch 3": 3}
    throughput.show(result)
    assert "chunks per second" in capsys.readouterr().out


@pytest.mark.parametrize("batches", [[], [0], [2, -1], [2, 2]])
def test_wrong_batches_are_refused(setup, batches):
    with pytest.raises(ValueError, match="batches: expected different numbers from 1"):
        throughput.measure(setup, batches, 1, "")


def test_nothing_is_timed_if_a_batch_computes_something_else(setup, monkeypatch):
    monkeypatch.setattr(throughput, "run", lambda *arguments: pytest.fail("timed"))
    right = throughput._infer

    def wrong(subject: Subject, batch: int):
        return right(subject, batch) * (1.01 if batch == 2 else 1)

    monkeypatch.setattr(throughput, "_infer", wrong)
    with pytest.raises(RuntimeError, match="nothing was timed: in a batch of 2"):
        throughput.measure(setup, [1, 2], 1, "")
