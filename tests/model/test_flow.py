"""The time convention: sampler and training pair agree on it."""

from __future__ import annotations

import torch

from xr0_engine.model.flow import bend, euler_sample, flow_times, prefix_positions, training_pair

EXACT = 1e-6
"""A handful of float32 operations."""


def test_schedule_starts_at_noise():
    torch.testing.assert_close(flow_times(5), torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8]))
    assert flow_times(1).tolist() == [0.0]


def test_training_pair_ends_are_noise_and_action():
    noise, action = torch.randn(2, 3, 4, 5)
    nowhere = torch.zeros(3, 4, dtype=torch.bool)
    z, target = training_pair(noise, action, torch.zeros(3, 1, 1), nowhere)
    assert torch.equal(z, noise)
    torch.testing.assert_close(noise + target, action)
    z, _ = training_pair(noise, action, torch.ones(3, 1, 1), nowhere)
    assert torch.equal(z, action)


def test_prefix_is_clean_at_any_time():
    noise, action = torch.randn(2, 2, 6, 3)
    is_prefix = prefix_positions(torch.tensor([0, 4]), 6)
    assert is_prefix.sum(1).tolist() == [0, 4]
    z, _ = training_pair(noise, action, torch.full((2, 1, 1), 0.25), is_prefix)
    assert torch.equal(z[1, :4], action[1, :4])
    torch.testing.assert_close(z[0], 0.75 * noise[0] + 0.25 * action[0])


def test_the_true_velocity_leads_from_noise_to_action():
    """With the training target as velocity, Euler arrives exactly: sampler and pair share one convention."""
    noise, action = torch.randn(2, 2, 6, 3)
    is_prefix = prefix_positions(torch.tensor([2, 0]), 6)
    seen = []

    def velocity(z, step):
        expected, target = training_pair(noise, action, flow_times(4)[step], is_prefix)
        torch.testing.assert_close(z, expected, rtol=0, atol=EXACT)
        seen.append(step)
        return target

    trace: list[torch.Tensor] = []
    ones = torch.ones(2, 6, 3)
    result = euler_sample(velocity, noise, action, is_prefix, ones, 4, trace)
    torch.testing.assert_close(result, action, rtol=0, atol=EXACT)
    assert torch.equal(result[0, :2], action[0, :2])
    assert seen == [0, 1, 2, 3]
    assert len(trace) == 5
    assert torch.equal(trace[-1], result)


def test_state_stays_float32_for_low_precision_velocities():
    noise = torch.full((1, 2, 3), 1.0)
    nowhere, ones = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, 3)
    small = torch.full((1, 2, 3), 2**-10, dtype=torch.bfloat16)
    result = euler_sample(lambda z, step: small, noise, noise, nowhere, ones, 4)
    # bfloat16 would absorb every one of these increments.
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, noise + 2**-10, rtol=0, atol=EXACT)


def test_bend_says_how_straight_a_flow_was():
    """Of given actions and masked columns, whatever they did, nothing counts."""
    start, step = torch.randn(2, 3, 4, 5)
    straight = [start + number * step for number in range(6)]
    there_and_back = [start + (number % 2) * step for number in range(5)]
    is_prefix, mask = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, 5)
    torch.testing.assert_close(bend(straight, is_prefix, mask), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(bend(there_and_back, is_prefix, mask), torch.ones(3))
    is_prefix[:, :2], mask[..., 3:] = True, 0
    torn = [z.clone() for z in straight]
    torn[2][:, :2], torn[3][..., 3:] = 100, -100
    torch.testing.assert_close(bend(torn, is_prefix, mask), torch.zeros(3), rtol=0, atol=1e-3)
    # A corner after half of the way: two velocities at right angles, each half of the time.
    corner = [torch.tensor([[[min(n, 2), max(n - 2, 0)]]]).float() for n in range(5)]
    none, both = torch.zeros(1, 1, dtype=torch.bool), torch.ones(1, 1, 2)
    torch.testing.assert_close(bend(corner, none, both), torch.tensor([0.5**0.5]))
    assert bend(straight, torch.ones(3, 4, dtype=torch.bool), mask).tolist() == [0, 0, 0]
