"""What an engine does not take, because of what it would cost, and what it does not give out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from xr0_engine.checkpoint import init_checkpoint
from xr0_engine.engine import Engine
from xr0_engine.robot.limits import ImageLimits
from xr0_engine.robot.preprocess import Preprocessor
from xr0_engine.types import Inference


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    init_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


def with_statistics(engine, **changes):
    """The engine with other statistics of libero_all."""
    changed = {**engine.statistics, "libero_all": replace(engine.statistics["libero_all"], **changes)}
    preprocess = Preprocessor(engine.config, engine._preprocess.tokenizer, changed)
    return Engine(engine.model, preprocess)


def test_actions_that_are_not_finite_do_not_leave(engine):
    # As a file could not have it: refused when it is read.
    large = with_statistics(engine, std=np.full_like(engine.statistics["libero_all"].std, 3e38))
    example = engine.example("libero_all", (64, 64))
    with pytest.raises(RuntimeError, match="not finite in the units of 'libero_all'"):
        large.infer(example, seed=0)
    (outcome,) = large.infer_all([Inference(example, seed=0)])
    assert isinstance(outcome, RuntimeError)
    # The engine serves the next.
    assert np.isfinite(large.infer(engine.example("bimanual", (64, 64)), seed=0).actions).all()


def test_a_prefix_that_its_statistics_make_infinite_is_refused(engine):
    prefix = np.full((2, 32), 3e38, np.float32)
    with pytest.raises(ValueError, match="prefix: expected actions that 'libero_all' can have"):
        engine.infer(engine.example("libero_all", (64, 64)), prefix=prefix, seed=0)


def test_plausible_actions_leave_if_that_is_asked_for(folder, engine):
    careful, example = Engine.from_pretrained(folder, "cpu", "float32"), engine.example("libero_all", (64, 64))
    assert careful.plausible_std is None
    expected = engine.infer(example, seed=0)
    furthest = float(np.abs(expected.normalized[:, :7]).max())
    careful.plausible_std = furthest * 1.01
    np.testing.assert_array_equal(careful.infer(example, seed=0).actions, expected.actions)
    careful.plausible_std = furthest * 0.99
    with pytest.raises(RuntimeError, match=r"more than .* std from the mean in columns \[\d\]"):
        careful.infer(example, seed=0)
    # What is committed already is the caller's.
    prefix = expected.actions.copy()
    careful.infer(example, prefix=prefix, seed=0)


def test_what_an_instruction_costs_is_limited_before_the_model_runs(engine, monkeypatch):
    monkeypatch.setattr(engine.model, "step", lambda *_: pytest.fail("the model ran"))
    example = engine.example("libero_all", (64, 64))
    for text, told in (("x" * 100_000, "4096 characters"), ("\U0001f9bf" * 4000, "4096 tokens of text")):
        with pytest.raises(ValueError, match=f"instruction: expected at most {told}"):
            engine.infer(replace(example, instruction=text))


def test_images_beyond_a_prompt_are_refused_before_they_are_cut(engine, monkeypatch):
    limits = ImageLimits(1024, 2**26)
    preprocess = Preprocessor(engine.config, engine._preprocess.tokenizer, engine.statistics, limits=limits)
    monkeypatch.setattr("xr0_engine.robot.preprocess.images_to_patches", lambda *_: pytest.fail("an image was cut"))
    image = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (4096, 4096, 3))
    example = replace(engine.example("libero_all", (64, 64)), prepared=True)
    with pytest.raises(ValueError, match="images: expected a prompt of at most 8192 tokens, got 32768"):
        preprocess([replace(example, images=dict.fromkeys(example.images, image))])
