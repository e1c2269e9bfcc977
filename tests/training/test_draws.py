"""Statistics of the samplers: flow times, prefix lengths, hidden columns."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.support import make_config
from xr0_engine.model.dit import dit_geometry
from xr0_engine.training.config import FlowConfig
from xr0_engine.training.draws import draw_flow, draw_prefix_length, draw_times, hide_columns, micro_batch_generator

DRAWS = 10_000
FREQUENCY_ERROR = 0.025
"""Five standard deviations of a frequency out of DRAWS, 5 * 0.5 / sqrt(DRAWS)."""


def cdf_of(config: FlowConfig, points: torch.Tensor) -> torch.Tensor:
    drawn = draw_times(config, torch.Generator().manual_seed(0), DRAWS)
    assert drawn.shape == (DRAWS,)
    assert bool(((drawn >= 0) & (drawn <= 1)).all())
    return (drawn[:, None] <= points).float().mean(0)


@pytest.mark.parametrize(
    ("time", "cdf"),
    [
        # t <= x is u >= 1 - x / 0.999, and u ~ Beta(1.5, 1) has the distribution function u^1.5.
        ("beta", lambda x: 1 - (1 - x / 0.999) ** 1.5),
        ("logistic_normal", lambda x: torch.special.ndtr(torch.logit(x))),
        ("uniform", lambda x: x),
    ],
)
def test_flow_times_follow_their_distribution(time, cdf):
    points = torch.linspace(0.05, 0.95, 19)
    assert (cdf_of(FlowConfig(time=time), points) - cdf(points)).abs().max() < FREQUENCY_ERROR


def test_beta_prefers_noise():
    drawn = draw_times(FlowConfig(), torch.Generator().manual_seed(0), DRAWS)
    assert abs(float(drawn.mean()) - 0.999 * 0.4) < FREQUENCY_ERROR
    assert float(drawn.max()) <= 0.999


def lengths(config: FlowConfig, chunk: int) -> Counter:
    generator = torch.Generator().manual_seed(0)
    return Counter(draw_prefix_length(config, generator, chunk) for _ in range(DRAWS))


@pytest.mark.parametrize(
    ("prefix", "chunk", "expected"),
    [
        ("none", 30, {0: 1.0}),
        ("code", 30, {0: 1 / 2} | dict.fromkeys(range(1, 7), 1 / 12)),
        ("paper", 30, dict.fromkeys(range(7), 1 / 7)),
        ("code", 4, {0: 1 / 2} | dict.fromkeys(range(1, 4), 1 / 6)),
        ("paper", 4, dict.fromkeys(range(4), 1 / 4)),
        ("paper", 1, {0: 1.0}),
    ],
)
def test_prefix_lengths(prefix, chunk, expected):
    drawn = lengths(FlowConfig(prefix=prefix), chunk)
    assert set(drawn) == set(expected)
    assert all(abs(drawn[length] / DRAWS - share) < FREQUENCY_ERROR for length, share in expected.items())


def test_hidden_columns_are_half_of_those_before_the_last_two():
    config = FlowConfig(prefix="paper", column_dropout=0.5, repeat=1)
    drawn = [draw_flow(config, micro_batch_generator(0, n), 1, 30, 1) for n in range(1_000)]
    six = torch.stack([draw.hidden for draw in drawn if draw.prefix_length == 6]).float()
    # A seventh of 1,000 draws: five standard deviations are 0.21.
    assert (six[:, :4].mean(0) - 0.5).abs().max() < 0.21
    assert not six[:, 4:].any()
    assert not any(bool(draw.hidden.any()) for draw in drawn if draw.prefix_length <= 2)


def test_hidden_columns_reach_the_noisy_actions_alone():
    config = make_config(head={"local_window": 4, "position_offset": 10}).head
    kv_mask = torch.ones(2, 5, dtype=torch.bool)
    mask = dit_geometry(config, torch.zeros(3, 2, dtype=torch.long), kv_mask, torch.tensor([4, 4]), 8).mask
    hidden = torch.tensor([True, False, False, False])
    changed = hide_columns(mask, hidden, 4, 8)
    # Queries are [sink, state, a0 .. a7], keys the 5 of the VLM before them: action i is query 2 + i, key 7 + i.
    assert mask[:, :, 2 + 4, 7].all()
    assert not changed[:, :, 2 + 4 :, 7].any()
    assert torch.equal(changed[:, :, : 2 + 4], mask[:, :, : 2 + 4])
    keep = [key for key in range(mask.shape[-1]) if key != 7]
    assert torch.equal(changed[..., keep], mask[..., keep])


def test_draws_depend_on_seed_and_number_alone():
    config = FlowConfig(prefix="code", column_dropout=0.5)
    first, again, other = (draw_flow(config, micro_batch_generator(3, n), 2, 5, 4) for n in (7, 7, 8))
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.t, again.t)
    assert first.prefix_length == again.prefix_length
    assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, draw_flow(config, micro_batch_generator(4, 7), 2, 5, 4).noise)
    assert first.noise.shape == (8, 5, 4)
    assert len(first.t.unique()) == 8
