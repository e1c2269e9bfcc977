"""Guided calls of an engine: drawn as asked, on each backend, refused where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.test_engine import SAME, closest
from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.fused.model import FusedModel
from xr0_engine.fused.tactics import TacticTable
from xr0_engine.types import Guide, Inference

NEAR = 0.15
"""In std, between frozen actions and their guide, whose noise is 1: what five steps leave of it."""
SIZE = (64, 64)
FUSED = 1e-4
"""Normalised actions of order 1, float32: a KV block by other sums."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


def guide_of(engine, robot_type, length, frozen, seed=1):
    return Guide(engine.infer(engine.example(robot_type, SIZE), seed=seed).actions[:length], frozen)


def distance(chunk, other):
    return np.abs(chunk.normalized - other.normalized)[:, chunk.active_columns].mean(1)


@pytest.mark.parametrize("robot_type", ["bimanual", "libero_all"])
def test_a_chunk_goes_on_from_its_guide(engine, robot_type):
    observation = engine.example(robot_type, SIZE)
    free, other = (engine.infer(observation, seed=seed) for seed in (0, 1))
    length, frozen = (12, 4) if robot_type == "bimanual" else (6, 2)
    chunk = engine.infer(observation, seed=0, guide=Guide(other.actions[:length], frozen))
    assert chunk.prefix_length == 0
    assert list(chunk.timing_ms) == ["preprocess", "vision", "prefill", "flow", "decode", "total"]
    before, after = distance(free, other), distance(chunk, other)
    assert after[:frozen].max() < NEAR < before[:frozen].min()
    assert (after[:length] < before[:length]).all()
    assert after[length:].mean() > 0.9 * before[length:].mean()


def test_an_empty_guide_draws_nowhere(engine):
    observation = engine.example("bimanual", SIZE)
    nothing = Guide(np.zeros((0, 32)), 0)
    assert closest(engine.infer(observation, seed=0, guide=nothing), engine.infer(observation, seed=0)) == 0


def test_rows_of_a_batch_are_drawn_as_alone(engine):
    observation, guide = engine.example("bimanual", SIZE), guide_of(engine, "bimanual", 12, 4)
    together = engine.infer([observation] * 3, seed=[0, 1, 2], guide=[None, guide, None])
    for row, own in enumerate((None, guide, None)):
        assert closest(together[row], engine.infer(observation, seed=row, guide=own)) < SAME
    calls = [Inference(observation, seed=0, guide=guide), Inference(observation, seed=0)]
    guided, plain = engine.infer_all(calls)
    assert closest(guided, engine.infer(observation, seed=0, guide=guide)) == 0
    assert closest(plain, engine.infer(observation, seed=0)) == 0


def test_a_program_in_inference_mode_changes_nothing(folder, engine):
    observation, guide = engine.example("bimanual", SIZE), guide_of(engine, "bimanual", 12, 4)
    expected = engine.infer(observation, seed=0, guide=guide)
    with torch.inference_mode():
        assert closest(engine.infer(observation, seed=0, guide=guide), expected) == 0
        loaded = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    assert closest(loaded.infer(observation, seed=0, guide=guide), expected) == 0


def test_the_fused_backend_runs_what_is_before_the_flow(folder, engine):
    observation, guide = engine.example("libero_all", SIZE), guide_of(engine, "libero_all", 6, 3)
    plain = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    fused = Engine(FusedModel(plain.model, "reference", TacticTable(""), graphs=False), plain._preprocess, "triton")
    assert fused.takes_guides
    chunk = fused.infer(observation, seed=0, guide=guide)
    assert closest(chunk, engine.infer(observation, seed=0, guide=guide)) < FUSED
    assert list(chunk.timing_ms) == ["preprocess", "vision", "prefill", "flow", "decode", "total"]


class Graphs:
    """A network without weights to differentiate, as an export is."""

    def __init__(self, model):
        self.config, self.device, self.patch_buffer = model.config, model.device, model.patch_buffer


def test_graphs_take_no_guide(engine):
    exported = Engine(Graphs(engine.model), engine._preprocess, "onnx")
    assert not exported.takes_guides
    with pytest.raises(NotImplementedError, match=r"guide: an export's graphs .* Engine\.from_pretrained"):
        exported.infer(engine.example("bimanual", SIZE), guide=Guide(np.zeros((3, 32)), 1))


@pytest.mark.parametrize(
    ("guide", "complaint"),
    [
        pytest.param(np.zeros((3, 32)), "guide: expected a Guide, got ndarray", id="array"),
        pytest.param(Guide(np.zeros((3, 32)), 4), "guide, frozen: expected how many of its 3", id="frozen"),
        pytest.param(Guide(np.zeros((3, 32)), True), "guide, frozen: expected how many of its 3", id="truth"),
        pytest.param(Guide(np.zeros((3, 7)), 1), r"guide: expected \(at most 30, 32\), got \(3, 7\)", id="narrow"),
        pytest.param(Guide(np.zeros((31, 32)), 1), r"guide: expected \(at most 30, 32\)", id="long"),
        pytest.param(Guide(np.full((3, 32), np.nan), 1), "guide: expected finite", id="NaN"),
        pytest.param(Guide(["left"], 1), r"guide: expected \(at most 30, 32\), got \(1,\)", id="text"),
    ],
)
def test_what_is_no_guide_is_refused(engine, guide, complaint):
    observation = engine.example("bimanual", SIZE)
    with pytest.raises(ValueError, match=complaint):
        engine.infer(observation, guide=guide)


def test_prefix_and_guide_exclude_each_other(engine):
    observation, guide = engine.example("bimanual", SIZE), Guide(np.zeros((3, 32)), 1)
    with pytest.raises(ValueError, match="prefix, guide: expected at most one of them"):
        engine.infer(observation, prefix=np.zeros((2, 32)), guide=guide)
    with pytest.raises(ValueError, match=r"guide: expected one per observation \(2\), got 1"):
        engine.infer([observation] * 2, guide=[guide])
