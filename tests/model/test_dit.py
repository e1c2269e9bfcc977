"""Geometry and time of the action head (the arithmetic is the golden cases' part)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.support import make_config
from xr0_engine.model.dit import ActionHead, dit_geometry
from xr0_engine.types import KVBlock

SAME = 1e-5
"""The same sums in another order, float32."""


def geometry(prefix, length=9, window=None, offset=0, state_length=1, next_position=(7, 5, 5), padding=2):
    config = replace(make_config().head, local_window=window, position_offset=offset, state_length=state_length)
    kv_mask = torch.ones(len(prefix), 6, dtype=torch.bool)
    kv_mask[:, :padding] = False
    base = torch.tensor(next_position)[:, None].expand(3, len(prefix))
    return dit_geometry(config, base, kv_mask, torch.tensor(prefix), length)


@pytest.mark.parametrize("state_length", [1, 3])
@pytest.mark.parametrize(("window", "offset"), [(None, 0), (4, 10), (0, 1), (1, 0)])
@pytest.mark.parametrize("prefix", [[0], [3], [9], [0, 2, 9]], ids=str)
def test_geometry_follows_the_table(prefix, window, offset, state_length):
    made = geometry(prefix, window=window, offset=offset, state_length=state_length)
    context = 1 + state_length
    for row, length in enumerate(prefix):
        for token in range(context + 9):
            is_noisy_action = token >= context + length
            shift = token + (offset if is_noisy_action else 0)
            assert made.positions[:, row, token].tolist() == [7 + shift, 5 + shift, 5 + shift]
            for other in range(context + 9):
                if other < context:
                    visible = other <= token
                else:
                    visible = other <= token and (window is None or token - other <= window)
                assert bool(made.mask[row, 0, token, 6 + other]) == visible, (token, other)
            assert made.mask[row, 0, token, :6].tolist() == [False, False, True, True, True, True]


def head_and_kv(config, batch, tokens=11):
    torch.manual_seed(0)
    head = ActionHead(config)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    sizes = (config.head.num_layers, batch, config.head.num_kv_heads, tokens, config.head.head_dim)
    kv = KVBlock(
        torch.randn(sizes),
        torch.randn(sizes),
        torch.ones(batch, tokens, dtype=torch.bool),
        torch.full((3, batch), tokens),
        torch.ones(batch, 8, config.head.action_dim),
    )
    return head, kv


def take(kv, row):
    one = slice(row, row + 1)
    parts = (kv.keys[:, one], kv.values[:, one], kv.mask[one], kv.next_position[:, one], kv.action_mask[one])
    return KVBlock(*parts)


@torch.no_grad()
def test_rows_of_a_batch_have_prefixes_of_their_own():
    config = make_config(head={"local_window": 4, "position_offset": 10})
    head, kv = head_and_kv(config, 3)
    state, noise, prefix = torch.randn(3, 1, 32), torch.randn(3, 8, 32), torch.randn(3, 8, 32)
    lengths, table = torch.tensor([0, 3, 8]), head.modulation_table()
    together = head.sample(kv, state, noise, prefix, lengths, table)
    for row in range(3):
        one = slice(row, row + 1)
        alone = head.sample(take(kv, row), state[one], noise[one], prefix[one], lengths[one], table)
        torch.testing.assert_close(together[one], alone, rtol=0, atol=SAME)
    assert torch.equal(together[1, :3], prefix[1, :3])
    assert torch.equal(together[2], prefix[2])


@torch.no_grad()
def test_values_behind_the_prefix_length_are_never_read():
    head, kv = head_and_kv(make_config(), 1)
    state, noise, prefix = torch.randn(1, 1, 32), torch.randn(1, 8, 32), torch.randn(1, 8, 32)
    poisoned = prefix.clone()
    poisoned[:, 3:] = math.nan
    table, length = head.modulation_table(), torch.tensor([3])
    clean = head.sample(kv, state, noise, prefix, length, table)
    assert torch.equal(head.sample(kv, state, noise, poisoned, length, table), clean)


@torch.no_grad()
def test_masked_columns_keep_their_noise_and_reach_no_other():
    head, kv = head_and_kv(make_config(), 1)
    kv.action_mask[..., 5] = 0
    state, noise, nothing = torch.randn(1, 1, 32), torch.randn(1, 8, 32), torch.zeros(1, 8, 32)
    table, none = head.modulation_table(), torch.tensor([0])
    first = head.sample(kv, state, noise, nothing, none, table)
    other = noise.clone()
    other[..., 5] += 3
    second = head.sample(kv, state, other, nothing, none, table)
    torch.testing.assert_close(second[..., 5] - first[..., 5], torch.full((1, 8), 3.0), rtol=0, atol=SAME)
    kept = [column for column in range(32) if column != 5]
    assert torch.equal(second[..., kept], first[..., kept])


@torch.no_grad()
def test_table_is_the_modulation_of_every_step():
    head, _ = head_and_kv(make_config(), 1)
    table = head.modulation_table()
    assert table.shape == (3, 5, 6, 1, 128)
    for step, time in enumerate((0.0, 0.2, 0.4, 0.6, 0.8)):
        alone = head.modulations(torch.tensor([time]))
        torch.testing.assert_close(table[:, step : step + 1], alone, rtol=0, atol=1e-4)  # values up to 20


@torch.no_grad()
def test_compat_bf16_time_rounds_time_and_frequencies():
    head, _ = head_and_kv(make_config(), 1)
    compat, _ = head_and_kv(make_config(head={"compat_bf16_time": True}), 1)
    # 1000 * 0.5 has an exact bfloat16, 1000 * 0.333 = 333 rounds to 332.
    exact, rounded = torch.tensor([0.5]), torch.tensor([0.333])
    assert torch.equal(compat.modulations(exact), head.modulations(exact))
    torch.testing.assert_close(compat.modulations(rounded), head.modulations(torch.tensor([0.332])), rtol=0, atol=1e-4)
    places = dit_geometry(head.config, torch.full((3, 1), 50), torch.ones(1, 4, dtype=torch.bool), torch.tensor([0]), 8)
    assert (head.rope(places)[0] - compat.rope(places)[0]).abs().max() > 0.01


def test_gradients_reach_every_parameter():
    head, kv = head_and_kv(make_config(head={"local_window": 4, "position_offset": 10}), 2)
    places = dit_geometry(head.config, kv.next_position, kv.mask, torch.tensor([2, 2]), 8)
    t = torch.tensor([0.3, 0.7])
    velocity = head(
        torch.randn(2, 8, 32),
        head.context(torch.randn(2, 1, 32)),
        head.modulations(t),
        head.rope(places),
        places.mask,
        kv.keys,
        kv.values,
    )
    velocity.square().mean().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)] == []
