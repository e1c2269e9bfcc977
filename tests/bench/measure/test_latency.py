"""Latency: the rivals compute the same or nothing is timed; what is written down is what was measured."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from xr0_engine.bench.cases import CASES, HeadSubject, Setup
from xr0_engine.bench.measure import baseline, latency
from xr0_engine.bench.measure.baseline import ReleasedHead
from xr0_engine.bench.measure.latency import measure, relative_rms, show
from xr0_engine.bench.results import Result
from xr0_engine.engine import Engine

STAGES = ["preprocess", "vision", "prefill", "flow", "decode", "total"]
SAME = 1e-5
"""Relative RMS in float32: the released structure sums in another order."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(name: str = "libero", dtype: str = "float32", **changes) -> Setup:
    return Setup(replace(CASES[name], **changes), "tiny", device="cpu", dtype=dtype, threads=1)


def test_engine_and_released_way_are_measured_stage_by_stage():
    result, reason = measure(tiny(), 2, "typed")
    assert reason is None
    assert result.complete
    assert (result.kind, result.boundary, result.command, result.backend) == ("latency", "stage", "typed", "reference")
    assert list(result.series) == ["engine", "released"]
    for stages in result.series.values():
        assert list(stages) == STAGES
        assert {len(samples) for samples in stages.values()} == {2}
    assert result.facts["error_against_engine"]["released"] < SAME
    assert result.facts["peak_memory_bytes"] > 0


def test_a_guided_call_is_a_rival():
    result, _ = measure(tiny(), 2, "", alone=True, guided=True)
    assert list(result.series) == ["engine", "guided"]
    assert list(result.series["guided"]) == STAGES
    assert result.facts["error_against_engine"] == {"guided": 0.0}
    with pytest.raises(ValueError, match="guided: expected part all"):
        measure(tiny("stress"), 1, "", guided=True)


def test_whole_call_has_one_number():
    result, _ = measure(tiny(), 1, "", boundary="infer", alone=True)
    assert result.boundary == "infer"
    assert {name: list(stages) for name, stages in result.series.items()} == {"engine": ["total"]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.family == "xr0"])
def test_action_head_alone(case, attention):
    result, _ = measure(tiny(case), 1, "", part="dit", attention=attention)
    assert result.boundary == "flow"
    assert list(result.series) == ["engine", "released"]
    assert result.facts["error_against_engine"]["released"] < SAME


def test_the_other_family_has_no_released_way():
    with pytest.raises(ValueError, match=r"case robodojo: .* is Xiaomi-Robotics-0's; take --alone"):
        measure(tiny("robodojo"), 1, "", part="dit")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_released_way_takes_batches_and_prefixes(attention):
    result, _ = measure(tiny("stress", batch=2, image_size=(64, 64)), 1, "", attention=attention)
    assert result.case["prefix_length"] == 6
    assert result.facts["error_against_engine"]["released"] < SAME


@pytest.mark.parametrize("part", latency.PARTS)
def test_compiled_way_is_a_third_rival(monkeypatch, part):
    compiled = []
    # Compiling takes minutes; that it is asked for, and for what, is what counts here.
    monkeypatch.setattr(torch, "compile", lambda function, mode: compiled.append((function.__name__, mode)) or function)
    result, _ = measure(tiny(), 1, "", part=part, compiled=True)
    assert list(result.series) == ["engine", "released", "compiled"]
    assert result.facts["error_against_engine"]["compiled"] < SAME
    parts = ["_step"] if part == "dit" else ["_step", "forward", "forward"]
    assert compiled == [(part, "max-autotune") for part in parts]


def test_machine_that_cannot_compile_says_why(monkeypatch):
    def fail(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")

    monkeypatch.setattr(baseline, "_compiled", lambda function: fail)
    with pytest.raises(RuntimeError, match=r"torch\.compile does not work here, leave it out: no C\+\+ compiler$"):
        measure(tiny(), 1, "", part="dit", compiled=True)


def test_nothing_is_timed_if_the_rivals_disagree(monkeypatch):
    monkeypatch.setattr(latency, "run", lambda *arguments: pytest.fail("timed"))
    right = ReleasedHead._step
    monkeypatch.setattr(ReleasedHead, "_step", lambda self, *arguments: 1.01 * right(self, *arguments))
    for part in latency.PARTS:
        with pytest.raises(RuntimeError, match="nothing was timed: engine and released differ by"):
            measure(tiny(), 1, "", part=part)


def test_interrupted_run_gives_its_finished_rounds(monkeypatch):
    infer, calls = Engine.infer, itertools.count()

    def interrupted(self, *arguments):
        # The gate, two rounds of warm-up and three that count come before.
        if next(calls) == 1 + 2 + 3:
            raise KeyboardInterrupt
        return infer(self, *arguments)

    monkeypatch.setattr(Engine, "infer", interrupted)
    result, reason = measure(tiny(), 9, "", alone=True)
    assert isinstance(reason, KeyboardInterrupt)
    assert not result.complete
    assert {len(samples) for samples in result.series["engine"].values()} == {3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"part": "vision"}, "part: expected one of all, dit", id="part"),
        pytest.param({"rounds": 0}, "rounds: expected at least 1, got 0", id="rounds"),
        pytest.param({"boundary": "moon"}, "boundary: expected one of stage, infer", id="boundary"),
        pytest.param({"boundary": "infer", "part": "dit"}, "boundary: expected one of flow", id="boundary of a part"),
        pytest.param({"alone": True, "compiled": True}, "alone: expected no options of the rivals", id="alone"),
        pytest.param({"attention": "linear"}, "attention: expected one of sdpa, eager, flash", id="attention"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(tiny(), **({"rounds": 1, "command": ""} | options))


@pytest.mark.parametrize(
    ("installed", "message"),
    [(False, "flash-attn is not installed"), (True, "needs a CUDA GPU")],
    ids=["absent", "CPU"],
)
def test_flash_attention_says_why_not(monkeypatch, installed, message):
    monkeypatch.setattr(baseline, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(NotImplementedError, match=message):
        measure(tiny(), 1, "", part="dit", attention="flash")


def test_flash_attention_cannot_have_the_window(monkeypatch):
    monkeypatch.setattr(baseline, "find_spec", lambda name: object())
    subject = HeadSubject.make(tiny(dtype="bfloat16"))
    object.__setattr__(subject.head.config, "local_window", 4)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(NotImplementedError, match="no such window"):
        ReleasedHead(subject.head, "flash")


def test_relative_rms():
    assert relative_rms(np.array([3.0, 4.4]), np.array([3.0, 4.0])) == pytest.approx(0.4 / 5)


def test_tables_fit_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    environment = {"device": "cpu", "processor": "AMD EPYC", "threads": 2, "cores": 2, "torch": "2.13.0+cpu"}
    case = {"name": "stress", "size": "4b", "batch": 8, "dtype": "bfloat16"}
    stages = {stage: [11_111.0 + number for number in range(1000)] for stage in STAGES}
    series = {"engine": stages, "released": stages, "compiled": stages}
    facts = {"peak_memory_bytes": 2**30}
    result = Result("latency", "", environment, case, "stage", "reference", series, facts, complete=False)
    show(result)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for text in ("stress, 4b, batch 8, bfloat16", "compiled", "p99.9", "quartiles", "1000 rounds", "1.00 GiB"):
        assert text in printed
    assert "INTERRUPTED" in printed
    assert "…" not in printed


def test_an_engine_of_one_graph_is_shown_beside_rivals_of_stages():
    series = {
        "engine": {"preprocess": [1.0, 1.0], "step": [4.0, 4.0], "decode": [0.1, 0.1], "total": [5.1, 5.1]},
        "released": {"preprocess": [2.0, 2.0], "vision": [9.0, 9.0], "total": [20.4, 20.4]},
    }
    result = Result("latency", "xr0", {}, {"name": "libero"}, "stage", "triton", series)
    table = latency._ratio_table(result, ["released"])
    assert list(table.columns[0].cells) == ["preprocess", "total"]
    assert list(table.columns[1].cells) == ["2.00", "4.00"]
