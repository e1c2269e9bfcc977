"""Cold start: fresh processes, and what the page cache was told."""

from __future__ import annotations

import os

import pytest

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.measure import coldstart


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=1)


def test_process_tells_its_stages(setup, capsys):
    result, reason = coldstart.measure(setup, 1, evict=False, command="typed")
    assert reason is None
    assert (result.kind, result.boundary, result.backend, result.case["size"]) == (
        "coldstart",
        "process",
        "reference",
        "tiny",
    )
    times = {stage: samples[0] for stage, samples in result.series["engine"].items()}
    assert list(times) == list(coldstart.STAGES)
    parts = ("start", "import", "load", "first infer")
    assert times["total"] == pytest.approx(sum(times[stage] for stage in parts))
    assert result.facts["weights_cached"] is True
    coldstart.show(result)
    assert "process start to first action" in capsys.readouterr().out


@pytest.mark.parametrize("evict", [False, True])
def test_page_cache_is_seen_to_before_each_process(setup, monkeypatch, evict):
    log = []
    monkeypatch.setattr(coldstart, "_read", lambda file: log.append("read"))
    monkeypatch.setattr(coldstart, "_drop", lambda file: log.append("drop"))
    told = {"times_ms": {"total": 1.0}, "case": {}, "backend": "reference"}
    monkeypatch.setattr(coldstart, "_fresh_process", lambda setup: log.append("process") or told)
    result, _ = coldstart.measure(setup, 2, evict, "")
    assert log == ["drop" if evict else "read", "process"] * 2
    assert result.facts["weights_cached"] is not evict


def test_files_are_read_whole_and_dropped(tmp_path, monkeypatch):
    file = tmp_path / "a.safetensors"
    file.write_bytes(os.urandom(3 * 2**20))
    monkeypatch.setattr(coldstart, "READ_BYTES", 2**20)
    coldstart._read(file)
    coldstart._drop(file)
    assert file.stat().st_size == 3 * 2**20


def test_process_that_fails_is_reported(setup, monkeypatch):
    monkeypatch.setattr(coldstart.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="the process that was measured ended with 1: no message"):
        coldstart.measure(setup, 1, evict=False, command="")


def test_rounds_are_checked(setup):
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        coldstart.measure(setup, 0, evict=False, command="")
