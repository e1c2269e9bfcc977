"""What an engine says of its flow: nothing unless it is asked, and then without another bit of an action."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from xr0_engine import Guide
from xr0_engine.drive.policies import TRAINED
from xr0_engine.engine import Engine
from xr0_engine.model.flow import bend, prefix_positions
from xr0_engine.model.xr0 import tell_bend


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained(TRAINED, "cpu", "float32", "reference")


def test_a_chunk_says_its_bend_if_it_is_to(engine):
    observation = engine.example(None, (48, 64))
    silent = engine.infer(observation, seed=3)
    assert silent.bend is None
    assert tell_bend(engine.model)
    told = engine.infer(observation, seed=3)
    np.testing.assert_array_equal(told.actions, silent.actions)
    assert 0 < told.bend < 1
    # A batch's rows each have their own; what is given does not count.
    dark = replace(observation, images={key: np.zeros_like(image) for key, image in observation.images.items()})
    prefix = told.actions[:4]
    first, second = engine.infer([observation, dark], prefix=[prefix, None], seed=[3, 3])
    assert first.bend != second.bend
    # Drawn toward a guide the flow is bent on purpose.
    assert engine.infer(observation, guide=Guide(prefix, 2), seed=3).bend is None


def test_it_is_that_of_the_trace(engine):
    observation = engine.example(None, (48, 64))
    tell_bend(engine.model)
    told = engine.infer(observation, seed=5).bend
    trace: list[torch.Tensor] = []
    kv = engine.prefill(observation)
    state = torch.from_numpy(np.atleast_2d(observation.state)).float()[None]
    noise = torch.randn(tuple(kv.action_mask.shape), generator=torch.Generator().manual_seed(5))
    nothing = torch.zeros(1, dtype=torch.long)
    engine.model.sample(kv, state, noise, noise, nothing, trace)
    expected = bend(trace, prefix_positions(nothing, noise.shape[1]), kv.action_mask)
    assert told == pytest.approx(expected.item(), rel=1e-5)
    assert len(trace) == 6
