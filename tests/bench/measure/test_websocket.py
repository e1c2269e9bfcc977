"""The boundary `websocket`: nothing is timed but the right actions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xr0_engine.bench.cases import CASES, Setup
from xr0_engine.bench.measure.latency import measure


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(name: str, **changes) -> Setup:
    return Setup(replace(CASES[name], **changes), "tiny", device="cpu", dtype="float32", threads=1)


def test_engine_and_null_policy_are_measured_through_their_servers():
    result, reason = measure(tiny("libero"), 3, "typed", boundary="websocket")
    assert reason is None
    assert (result.kind, result.boundary, result.complete) == ("latency", "websocket", True)
    assert list(result.series) == ["engine", "null"]
    for stages in result.series.values():
        assert {stage: len(samples) for stage, samples in stages.items()} == {"inference": 3, "overhead": 3, "total": 3}
        for inference, overhead, total in zip(*stages.values(), strict=True):
            assert inference + overhead == pytest.approx(total)
    assert result.series["null"]["inference"] == [0, 0, 0]


def test_a_batch_is_no_request():
    with pytest.raises(ValueError, match="expected one observation at a time, got stress with 8"):
        measure(tiny("stress"), 1, "", boundary="websocket")


def test_options_of_other_rivals_are_refused():
    with pytest.raises(ValueError, match="boundary websocket: expected no options of the rivals"):
        measure(tiny("libero"), 1, "", boundary="websocket", attention="eager")
