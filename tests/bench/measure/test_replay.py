"""The step's graphs beside the released way. On a CPU a session runs its ops one by one, on the kernels' oracles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xr0_engine.backend import DTYPES
from xr0_engine.bench.cases import CASES, Setup, Subject
from xr0_engine.bench.measure import replay
from xr0_engine.bench.measure.baseline import ReleasedModel
from xr0_engine.bench.measure.latency import GATE, measure, relative_rms
from xr0_engine.engine import Engine
from xr0_engine.fused.graph import GraphContents
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.robot.preprocess import Preprocessor

CASE = replace(CASES["bimanual"], image_size=(64, 64), prefix_length=2)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def subject(_cache):
    plain = Subject.load(Setup(CASE, "tiny", device="cpu", dtype="float32", threads=1))
    released = ReleasedModel(plain.folder, plain.engine.config, plain.engine.model.head, DTYPES["float32"])
    fused = FusedModel(plain.engine.model, "reference", TacticTable(""), graphs=False)
    return replace(plain, engine=Engine(fused, Preprocessor.load(plain.folder), "reference")), released


@pytest.mark.parametrize("boundary", replay.REPLAY_BOUNDARIES)
def test_rivals_have_the_same_stages_and_actions(subject, boundary):
    ours, released = subject
    rivals = replay.engine_rival(*replay.session_of(ours), boundary), replay.released_rival(released, ours, boundary)
    (timed, actions), (their_timed, their_actions) = rivals
    expected = {"vision", "prefill", "flow", "total"} if boundary == "replay" else {"total"}
    assert set(timed()) == set(their_timed()) == expected
    assert min(timed().values()) > 0
    assert relative_rms(their_actions(), actions()) < GATE["float32"]
    chunk = ours.infer()[0].normalized
    assert np.array_equal(actions()[0], chunk)


def test_another_case_shares_the_model(subject):
    ours, _ = subject
    other = ours.with_case(replace(CASES["two_views"], image_size=(64, 64), batch=2))
    assert other.engine.model is ours.engine.model
    given = other.step_inputs()
    assert given.noise.shape == given.prefix.shape == (2, 30, 32)
    assert len(other.infer()) == 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_no_graphs_without_a_gpu(backend):
    setup = Setup(CASE, "tiny", device="cpu", dtype="float32", backend=backend)
    with pytest.raises(NotImplementedError, match="boundary 'replay': it needs CUDA graphs"):
        measure(setup, 1, "", boundary="replay")
    with pytest.raises(NotImplementedError, match="graph: it needs CUDA graphs"):
        replay.captured(setup)


def test_an_export_has_no_such_boundary(tmp_path):
    with pytest.raises(ValueError, match=r"export: expected none beside boundary update\+replay"):
        measure(Setup(CASE, "tiny", device="cpu"), 1, "", boundary="update+replay", export=tmp_path)


def test_contents_are_shown_side_by_side(capsys):
    replay._show(
        {
            "step": GraphContents({"kernel": 900, "event_record": 1}, {"_linear": 700, "_qkv": 200}),
            "flow": GraphContents({"kernel": 400}, {"_linear": 400}),
        }
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["nodes", "step", "flow"] in lines
    assert ["_linear", "700", "400"] in lines
    assert ["_qkv", "200"] in lines
