"""Benchmarks that know 8 bits: the rival, what is written down of it, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure import coldstart, eight_bits, jitter, latency, throughput
from xr0_engine.bench.measure.eight_bits import agreement, check_agreement, weights_bytes
from xr0_engine.bench.tell.tables import precision
from xr0_engine.engine import Engine
from xr0_engine.model.quantized import QuantizedLinear
from xr0_engine.quantize.folder import write_quantized
from xr0_engine.quantize.gate import Gate
from xr0_engine.types import CheckpointError


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    subject = Subject.load(tiny())
    out = tmp_path_factory.mktemp("quantised") / "eight"
    out.mkdir()
    engine = Engine.from_pretrained(subject.folder, "cpu", "float32", quantize="int8")
    layers = {
        name.removeprefix("head."): module.format
        for name, module in engine.model.named_modules()
        if isinstance(module, QuantizedLinear)
    }
    write_quantized(subject.folder, out, "auto", layers)
    return out


def tiny(**changes) -> Setup:
    return Setup(CASES["libero"], "tiny", device="cpu", dtype="float32", threads=1, **changes)


def exactly(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_the_engine_in_8_bits_takes_turns_with_the_one_in_16(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result, reason = latency.measure(tiny(quantize="int8"), 2, "", alone=True)
    assert reason is None
    assert list(result.series) == ["engine", "int8"]
    assert list(result.series["engine"]) == list(result.series["int8"])
    assert "recipe" not in result.case, "the engine's own"
    facts = result.facts
    assert facts["precision"] == {"engine": "float32", "int8": "float32, 8 bits by recipe int8"}
    apart = facts["agreement"]["int8"]
    assert eight_bits.LEAST_COSINE < apart["cosine"] < 1
    assert 0 < apart["largest_difference"] < 0.1
    assert list(facts["error_against_engine"]) == ["int8"]
    subjects = (Subject.load(tiny()), Subject.load(tiny(quantize="int8")))
    assert list(facts["weights_bytes"].values()) == [exactly(subject.plain_model()) for subject in subjects]
    latency.show(result)
    printed = capsys.readouterr().out
    assert f"{apart['cosine']:.6f}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_rivals_of_all_kinds_stand_side_by_side():
    result, _ = latency.measure(tiny(quantize="int8-weights"), 1, "", boundary="infer", guided=True)
    assert list(result.series) == ["engine", "guided", "released", "int8-weights"]


def test_nothing_is_timed_of_8_bits_that_are_too_far_off(monkeypatch):
    monkeypatch.setattr(latency, "run", lambda *arguments: pytest.fail("timed"))
    monkeypatch.setattr(eight_bits, "LEAST_COSINE", 1.0)
    with pytest.raises(RuntimeError, match=r"nothing was timed: the cosine of chunks by recipe int8 .* less than 1\.0"):
        latency.measure(tiny(quantize="int8"), 1, "", alone=True)


def test_agreement_is_the_worst_pairs():
    engine = np.array([[[1.0, 0.0]], [[0.0, 2.0]]])
    eight = np.array([[[3.0, 0.0]], [[0.1, 2.0]]])
    assert agreement(eight, engine) == {"cosine": pytest.approx(2 / np.hypot(0.1, 2)), "largest_difference": 2.0}
    with pytest.raises(RuntimeError, match="nan"):
        check_agreement("int8", agreement(eight * np.nan, engine))


def test_the_tolerance_is_a_gates():
    assert Gate().least_cosine == eight_bits.LEAST_COSINE


def test_weights_that_share_memory_count_once():
    whole = torch.zeros(6, 4)
    parts = torch.nn.ParameterList(torch.nn.Parameter(rows) for rows in whole.split(3))
    assert weights_bytes(parts) == whole.nbytes


@pytest.mark.parametrize(
    "measure",
    [
        lambda setup: throughput.measure(setup, [1, 2], 1, ""),
        lambda setup: jitter.measure(setup, 100.0, 0.01, ""),
        lambda setup: coldstart.measure(setup, 1, False, ""),
    ],
    ids=["throughput", "jitter", "coldstart"],
)
def test_other_measurements_are_of_the_engine_in_8_bits(measure, capsys):
    module = {"throughput": throughput, "jitter": jitter, "coldstart": coldstart}
    result, _ = measure(tiny(quantize="int8"))
    assert (result.case["dtype"], result.case["recipe"]) == ("float32", "int8")
    if result.kind != "coldstart":
        assert result.facts["weights_bytes"] == exactly(Subject.load(tiny(quantize="int8")).plain_model())
    module[result.kind].show(result)
    assert "float32, recipe int8" in capsys.readouterr().out


def test_a_folder_in_8_bits_tells_its_recipe(folder):
    result, _ = latency.measure(tiny(checkpoint=str(folder)), 1, "", alone=True)
    assert result.case["recipe"] == "auto"
    assert result.facts["precision"] == {"engine": "float32, 8 bits by recipe auto"}
    assert precision(result.case) == "float32, recipe auto"
    assert "compared" not in result.facts


def test_what_a_folder_was_compared_on_stands_in_the_result(folder, tmp_path):
    out = tmp_path / "eight"
    shutil.copytree(folder, out)
    spread = {"mean": 0.1, "worst": 0.2}
    told = {"moments": 16, "moments_of": ["mine"], "cosine": spread, "error": spread, "units": {"mm": spread}}
    (out / "fidelity.json").write_text(
        json.dumps({"version": 1, "recipe": "auto", "layers": {"dit.layers.0.attn.o_proj": "int8"}} | told)
    )
    result, _ = latency.measure(tiny(checkpoint=str(out)), 1, "", alone=True)
    assert result.facts["compared"] == told
    (out / "fidelity.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fidelity\.json"):
        latency.measure(tiny(checkpoint=str(out)), 1, "", alone=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boundary": "replay"}, "quantize: expected part all, boundary stage or infer"),
        ({"boundary": "websocket"}, "quantize: expected part all, boundary stage or infer"),
        ({"part": "dit"}, "quantize: expected part all, boundary stage or infer"),
    ],
    ids=str,
)
def test_where_there_are_no_8_bits(options, message):
    with pytest.raises(ValueError, match=message):
        latency.measure(tiny(quantize="int8"), 1, "", **options)


def test_what_cannot_be_is_refused_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", lambda *arguments, **options: pytest.fail("loaded"))
    for measure in (
        lambda setup: latency.measure(setup, 1, ""),
        lambda setup: throughput.measure(setup, [1], 1, ""),
        lambda setup: jitter.measure(setup, 30.0, 1.0, ""),
        lambda setup: coldstart.measure(setup, 1, False, ""),
    ):
        with pytest.raises(ValueError, match=r"quantize: expected one of int8, fp8, int8-weights.*, got 'int4'"):
            measure(tiny(quantize="int4"))
    quantised = tiny(checkpoint=str(folder))
    with pytest.raises(ValueError, match="the released way has no 8 bits: take --alone"):
        latency.measure(quantised, 1, "")
    with pytest.raises(ValueError, match=r"is quantised already \(recipe auto\)"):
        latency.measure(replace(quantised, quantize="int8"), 1, "", alone=True)
