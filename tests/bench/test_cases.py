"""The cases: inputs that fit the checkpoint, and are the same every time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xr0_engine.bench.cases import CASES, HeadSubject, Setup, Subject, find_case
from xr0_engine.bench.step.workload import Workload
from xr0_engine.types import CheckpointError

TOKEN_DEVIATION = 0.15
"""The random checkpoint's tokenizer splits an instruction otherwise than Qwen's; the images' are the same."""


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XR0_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def tiny(name: str, **changes) -> Setup:
    return Setup(CASES[name], "tiny", device="cpu", dtype="float32", **({"threads": 1} | changes))


EXPECTED = {
    "libero": ([[256, 256]] * 2, 10, 0, 1),
    "bimanual": ([[480, 640]] * 3, 30, 0, 1),
    "two_views": ([[480, 640]] * 2, 30, 0, 1),
    "stress": ([[480, 640]] * 3, 30, 6, 8),
    "robodojo": ([[480, 640]] * 3, 30, 0, 1),
    "robocasa365": ([[256, 256]] * 3, 16, 0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_case_is_what_it_says(name):
    views, length, prefix, batch = EXPECTED[name]
    subject = Subject.load(tiny(name))
    found = subject.describe()
    assert (found["views"], found["chunk_length"], found["prefix_length"], found["batch"]) == (
        views,
        length,
        prefix,
        batch,
    )
    assert found["tokens"] == pytest.approx(CASES[name].tokens, rel=TOKEN_DEVIATION)
    assert (found["name"], found["size"], found["dtype"]) == (name, "tiny", "float32")
    assert len(subject.observations) == len(subject.prefixes) == batch
    assert subject.noise.shape == (batch, length, 32 if CASES[name].family == "xr0" else 60)
    # What is counted without a checkpoint is what runs with one.
    config, work = Workload.of_case(subject.setup)
    inputs = subject.inputs()
    assert (config.head, work.grids, work.chunk_length) == (subject.engine.config.head, inputs.image_grids, length)
    assert subject.setup.chunk()[1] == np.flatnonzero(inputs.action_mask[0].any(0)).tolist()


def test_stress_gives_chunks_that_keep_their_prefix():
    subject = Subject.load(tiny("stress"))
    chunks = subject.infer()
    for chunk, prefix in zip(chunks, subject.prefixes, strict=True):
        np.testing.assert_array_equal(chunk.actions[:6], prefix)
    # Every row sees other images.
    assert len({chunk.normalized.tobytes() for chunk in chunks}) == 8


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_the_same_every_time(name):
    first, second = Subject.load(tiny(name)), Subject.load(tiny(name))
    np.testing.assert_array_equal(first.noise, second.noise)
    for a, b in zip(first.observations, second.observations, strict=True):
        assert a.instruction == b.instruction
        for view in a.images:
            np.testing.assert_array_equal(a.images[view], b.images[view])
    assert first.prefixes[0] is None or np.array_equal(first.prefixes[0], second.prefixes[0])


def test_unknown_case_lists_the_known():
    with pytest.raises(ValueError, match=r"case: expected one of .*stress, robodojo, robocasa365; got 'kitchen'"):
        find_case("kitchen")
    assert find_case("libero") is CASES["libero"]


@pytest.mark.parametrize("size", ["small", "4b"])
def test_a_size_is_of_the_case_s_family(size):
    with pytest.raises(ValueError, match=f"size: expected tiny, 5b; got '{size}'"):
        Workload.of_case(Setup(CASES["robodojo"], size))


@pytest.mark.parametrize("kind", [Subject.load, HeadSubject.make], ids=["model", "head"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"size": "huge"}, "size: expected tiny, small, 4b; got 'huge'", id="size"),
        pytest.param({"dtype": "int4"}, "dtype: expected .*; got 'int4'", id="dtype"),
        pytest.param({"threads": 0}, "threads: expected at least 1, got 0", id="threads"),
        pytest.param({"device": "cuda:99"}, "device 'cuda:99'", id="missing GPU"),
        pytest.param({"device": "tpu"}, "device: expected", id="unknown device"),
    ],
)
def test_wrong_setup_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        kind(replace(tiny("libero"), **changes))


def test_missing_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        Subject.load(tiny("libero", checkpoint=str(tmp_path / "none")))


def test_own_checkpoint_is_used_and_named(tmp_path):
    own = tmp_path / "own"
    own.symlink_to(tiny("libero").folder())
    subject = Subject.load(replace(tiny("libero", checkpoint=str(own)), size="huge"))
    assert subject.describe()["size"] == "own"


def test_action_head_alone_needs_no_checkpoint():
    subject = HeadSubject.make(tiny("stress"))
    actions = subject.sample()
    assert actions.shape == (8, 30, 32)
    assert bool(actions.isfinite().all())
    assert torch.equal(actions[:, :6], subject.prefix[:, :6])
    assert torch.equal(actions, HeadSubject.make(tiny("stress")).sample())
    assert subject.describe()["tokens"] == CASES["stress"].tokens
    with pytest.raises(ValueError, match="checkpoint: expected none"):
        HeadSubject.make(tiny("stress", checkpoint="own"))
