"""Throughput: batches that give what single calls give, taking turns."""

from __future__ import annotations

import pytest

from tests.fused.cuda_on_paper import GPU
from tests.fused.test_lookahead import PaperEngine
from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure import throughput
from xr0_engine.fused.lookahead import Lookahead
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.session import Session
from xr0_engine.fused.tactics import TacticTable


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


def ahead_on_paper(monkeypatch) -> None:
    """The engine looks ahead though there is no GPU."""
    PaperEngine().install(monkeypatch)
    monkeypatch.setattr(throughput, "_lookahead", lambda model: Lookahead(GPU))
    monkeypatch.setattr(throughput, "QUEUED", 2)
    load = Subject.load

    def fused(setup: Setup) -> Subject:
        subject = load(setup)
        subject.engine.model = FusedModel(subject.engine.model, "reference", TacticTable(""), graphs=False)
        return subject

    monkeypatch.setattr(Subject, "load", fused)


def test_calls_that_wait_for_each_other_are_timed_both_ways(setup, monkeypatch, capsys):
    ahead_on_paper(monkeypatch)
    result, _ = throughput.measure(setup, [1], 2, "typed")
    assert list(result.series) == ["batch 1", "in turn", "ahead"]
    assert result.facts["queues"] == {"in turn": 2, "ahead": 2}
    throughput.show(result)
    assert "2 ahead" in capsys.readouterr().out


def test_nothing_is_timed_if_looking_ahead_changes_the_chunks(setup, monkeypatch):
    ahead_on_paper(monkeypatch)
    monkeypatch.setattr(throughput, "run", lambda *arguments: pytest.fail("timed"))
    monkeypatch.setattr(Session, "chunk_on_host", lambda session: session.chunk + 1)
    with pytest.raises(RuntimeError, match="nothing was timed: calls give other actions"):
        throughput.measure(setup, [1], 1, "")


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
