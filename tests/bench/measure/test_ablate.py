"""Every variant does without what it says, and gives the engine's actions."""

from __future__ import annotations

import pytest
import torch

from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure import ablate
from xr0_engine.bench.measure.ablate import ENGINE, GATE, Variant, check, variants
from xr0_engine.bench.results import read, write
from xr0_engine.bench.timing import WARM_UP
from xr0_engine.model.dit import DiTAttention, TimeEmbedder
from xr0_engine.model.vision import VisionTower
from xr0_engine.model.vlm import TextLayer
from xr0_engine.robot import patches
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.robot.prompt import PromptTokenizer

ROUNDING = 1e-5
"""Relative RMS that other shapes of the same float32 products may bring."""


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Setup(CASES["libero"], size="tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def subject(setup):
    return Subject.load(setup)


@pytest.fixture(scope="module")
def found(subject):
    found = variants(subject)
    # The first call fills what is kept.
    check(subject.infer, found, "float32")
    return found


def test_variants_give_the_engines_actions(subject, found):
    assert max(check(subject.infer, found, "float32").values()) < ROUNDING


def test_variants_of_this_machine(found):
    expected = {
        "prompt tokens kept",
        "position tables kept",
        "prompt head kept",
        "last layer K and V only",
        "adaLN table at load",
        "KV read where it lies",
    }
    assert set(found) == expected | ({"native image path"} if patches.native is None else set())


def count_calls(monkeypatch, owner, method, counts_one=lambda *arguments: True):
    """A list that gets an entry at every call of a method that counts."""
    calls = []
    original = getattr(owner, method)

    def counted(*arguments, **named):
        if counts_one(*arguments):
            calls.append(arguments)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, method, counted)
    return calls


@pytest.mark.parametrize(
    ("name", "owner", "method", "with_it", "without"),
    [
        pytest.param("prompt tokens kept", PromptTokenizer, "_encode", 0, 1, id="tokens"),
        pytest.param("position tables kept", VisionTower, "_make_tables", 0, 2, id="tables"),
        pytest.param("adaLN table at load", TimeEmbedder, "forward", 0, 5, id="adaLN"),
    ],
)
def test_what_is_kept_is_made_anew(monkeypatch, subject, found, name, owner, method, with_it, without):
    calls = count_calls(monkeypatch, owner, method)
    subject.infer()
    assert len(calls) == with_it
    found[name].infer()
    assert len(calls) == with_it + without


def test_prompt_head_is_computed(monkeypatch, subject, found):
    rows = count_calls(monkeypatch, TextLayer, "forward")
    subject.infer()
    kept = rows[0][1].shape[1]
    rows.clear()
    found["prompt head kept"].infer()
    head = subject.engine._preprocess(subject.observations).preamble_length
    assert head > 0
    assert rows[0][1].shape[1] == kept + head


def test_last_layer_runs_whole(monkeypatch, subject, found):
    whole = count_calls(monkeypatch, TextLayer, "forward", lambda layer, *_: not layer.kv_only)
    subject.infer()
    layers = len(whole)
    whole.clear()
    found["last layer K and V only"].infer()
    assert len(whole) == layers + 1 == subject.engine.config.text.num_layers


def test_keys_and_values_are_joined(monkeypatch, subject, found):
    joined = count_calls(monkeypatch, ablate.JoinedAttention, "forward")
    plain = count_calls(monkeypatch, DiTAttention, "forward")
    found["KV read where it lies"].infer()
    assert (len(joined), len(plain)) == (5 * subject.engine.config.head.num_layers, 0)


@pytest.mark.skipif(patches.native is not None, reason="the native module was not built")
def test_native_path_comes_back(monkeypatch, subject, found):
    without = count_calls(monkeypatch, Preprocessor, "__call__", lambda *_: patches.native is not None)
    found["native image path"].infer()
    assert len(without) == 1
    subject.infer()
    assert len(without) == 1


def test_weights_are_shared(subject):
    twin = ablate._twin(ablate.NoHead, subject.engine.model, head=ablate._with_joined_attention(subject.engine.model))
    ours = {name: parameter.data_ptr() for name, parameter in subject.engine.model.named_parameters()}
    assert {name: parameter.data_ptr() for name, parameter in twin.named_parameters()} == ours


def test_projections_are_packed_again(subject):
    model = subject.engine.model
    before = [part.packed for part in model.modules() if isinstance(part, ablate.PackedLinears)]
    assert all(isinstance(weight, torch.Tensor) for weight in before)
    with ablate._unpacked(model):
        assert all(part.packed is None for part in model.modules() if isinstance(part, ablate.PackedLinears))
    after = [part.packed for part in model.modules() if isinstance(part, ablate.PackedLinears)]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_other_actions_are_not_timed(subject):
    other = Variant("flow", "nonsense", lambda: subject.engine.infer(subject.observations, seed=3))
    with pytest.raises(RuntimeError, match="nothing was timed: without 'sense' the actions differ by"):
        check(subject.infer, {"sense": other}, "float32")


def test_result_and_its_table(setup, tmp_path, capsys, found):
    measured, stopped = ablate.measure(setup, 2, "xr0 bench ablate")
    write(measured, tmp_path / "ablate.json")
    result = read(tmp_path / "ablate.json")
    assert stopped is None
    assert result.complete
    assert set(result.series) == {ENGINE, *found}
    assert {len(samples) for stages in result.series.values() for samples in stages.values()} == {2}
    assert result.facts["stages"]["prompt head kept"] == "prefill"
    assert max(result.facts["error_against_engine"].values()) < GATE["float32"]
    ablate.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    lines = [line.strip() for line in lines]
    assert [name for name in found if any(line.startswith(f"{name} ") for line in lines)] == list(found)


def test_interrupted_run_keeps_its_rounds(setup, monkeypatch, found):
    calls = 0

    def interrupting(infer):
        def call():
            nonlocal calls
            calls += 1
            # In the second measured round.
            if calls > (len(found) + 1) * (WARM_UP + 1) + 2:
                raise KeyboardInterrupt
            return {"total": 1.0}

        return call

    monkeypatch.setattr(ablate, "_timed", interrupting)
    result, stopped = ablate.measure(setup, 5, "")
    assert isinstance(stopped, KeyboardInterrupt)
    assert not result.complete
    assert result.series[ENGINE]["total"] == [1.0]
