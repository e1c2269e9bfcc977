"""Guided chunks: the pull of a guide against its definition, on fields whose flow is known and on the action head."""

from __future__ import annotations

import math

import pytest
import torch

from tests.model.test_dit import head_and_kv
from tests.support import make_config
from xr0_engine.model.dit import dit_geometry
from xr0_engine.model.flow import (
    MAX_GUIDANCE,
    Guidance,
    euler_sample,
    flow_times,
    guidance_scale,
    guide_weights,
    guided_velocity,
)

EXACT = 1e-5
"""Some float32 operations on numbers of order 1."""
DIFFERENCES = 2e-2
"""Relative, of a float32 network's central difference: its rounding and its curvature over a step of 4e-3."""


@pytest.mark.parametrize(("length", "frozen", "chunk"), [(10, 4, 16), (16, 16, 16), (6, 0, 8), (1, 0, 4), (0, 0, 3)])
def test_weights_are_the_papers(length, frozen, chunk):
    """With H the chunk's actions, s those of the last chunk that are done, d the delay: length = H - s, frozen = d."""
    horizon, done, delay = chunk, chunk - length, frozen
    expected = []
    for i in range(horizon):
        c = (horizon - done - i) / (horizon - done - delay + 1)
        soft = c * (math.exp(c) - 1) / (math.e - 1)
        expected.append(1.0 if i < delay else soft if i < horizon - done else 0.0)
    (weights,) = guide_weights(torch.tensor([length]), torch.tensor([frozen]), chunk)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=0, atol=EXACT)
    assert (weights.diff() <= 0).all()


def test_rows_have_guides_of_their_own():
    weights = guide_weights(torch.tensor([0, 3, 5]), torch.tensor([0, 3, 1]), 5)
    assert weights[0].tolist() == [0] * 5
    assert weights[1].tolist() == [1, 1, 1, 0, 0]
    assert weights[2, 0] == 1
    assert 0 < weights[2, 4] < weights[2, 1] < 1


def test_scale_is_clipped_where_noise_or_action_is_all_there_is():
    """(1 - t) / (t r^2) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2); 0.5: 1 / (1 / 2)."""
    assert guidance_scale(0.0) == MAX_GUIDANCE == 5.0
    assert guidance_scale(0.5) == pytest.approx(2.0)
    assert guidance_scale(0.2) == pytest.approx(0.8 / 0.2 / (0.64 / 0.68)) == pytest.approx(4.25)
    assert guidance_scale(0.99) == MAX_GUIDANCE
    assert guidance_scale(0.99, math.inf) == pytest.approx((0.9801 + 0.0001) / 0.0099)


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_normal_actions_are_drawn_along_the_straight_way_to_the_guide(step, monkeypatch):
    """Where actions are standard normal the pull is exact: whatever z is, (guide - z) / (1 - t) leads to the guide."""
    monkeypatch.setattr("xr0_engine.model.flow.MAX_GUIDANCE", math.inf)
    monkeypatch.setattr("xr0_engine.model.flow.guidance_scale", lambda t: guidance_scale(t, math.inf))
    t = float(flow_times(5)[step])
    z, guide = torch.randn(2, 2, 6, 3)

    def velocity(z, step):
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * z

    ones = torch.ones(2, 6)
    v = guided_velocity(velocity, z, step, 5, torch.ones(2, 6, 3), Guidance(guide, ones))
    torch.testing.assert_close(v, (guide - z) / (1 - t), rtol=1e-4, atol=EXACT)


def test_a_linear_field_is_drawn_as_its_matrix_says():
    """v = M_t z + b over all of a chunk's numbers: J = I + (1 - t) M, and each Euler step in float64 by hand."""
    steps, actions, columns = 5, 4, 3
    size = actions * columns
    generator = torch.Generator().manual_seed(0)
    matrices = 0.3 * torch.randn(steps, size, size, generator=generator)
    bias = torch.randn(size, generator=generator)
    noise, guide = torch.randn(2, 1, actions, columns, generator=generator)
    mask = torch.ones(1, actions, columns)
    mask[..., 2] = 0
    weights = guide_weights(torch.tensor([3]), torch.tensor([1]), actions)

    def velocity(z, step):
        return (matrices[step] @ z.flatten() + bias).view(1, actions, columns)

    poisoned = torch.where(weights[..., None] > 0, guide, math.nan)
    nowhere = torch.zeros(1, actions, dtype=torch.bool)
    made = euler_sample(velocity, noise, noise, nowhere, mask, steps, guidance=Guidance(poisoned, weights))

    z, keep = noise.double().flatten(), mask.double().flatten()
    full = weights.double()[..., None].expand(1, actions, columns).flatten() * keep
    for step, t in enumerate(flow_times(steps).double()):
        matrix = matrices[step].double() @ torch.diag(keep)
        v = matrix @ z + bias
        jacobian = torch.eye(size) + (1 - t) * matrix
        pull = jacobian.T @ (full * (guide.double().flatten() - z - (1 - t) * v))
        scale = 5.0 if t == 0 else min(5.0, float((1 - t) / (t * (1 - t) ** 2 / (t**2 + (1 - t) ** 2))))
        z = z + (v + scale * pull) / steps
    torch.testing.assert_close(made.flatten(), z.float(), rtol=1e-4, atol=1e-4)


def test_without_weights_nothing_is_drawn():
    noise, guide = torch.randn(2, 2, 6, 3)
    nowhere, mask = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, 3)
    free = euler_sample(lambda z, step: torch.sin(z + step), noise, noise, nowhere, mask, 5)
    nothing = Guidance(guide, torch.zeros(2, 6))
    assert torch.equal(euler_sample(lambda z, s: torch.sin(z + s), noise, noise, nowhere, mask, 5, None, nothing), free)


@pytest.mark.parametrize("window", [None, 4])
def test_the_head_is_differentiated_as_finite_differences_say(window):
    config = make_config(head={"local_window": window, "position_offset": 10 if window else 0})
    head, kv = head_and_kv(config, 1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            # Streams of size 1, and actions that count in them: a random head hardly looks at its own.
            if "norm" in name:
                parameter.fill_(1.0)
            if name.startswith("action_projector"):
                parameter.mul_(10.0)
        table, state = head.modulation_table(), torch.randn(1, 1, 32)
        geometry = dit_geometry(head.config, kv.next_position, kv.mask, torch.tensor([0]), 8)
        rope, context = head.rope(geometry), head.context(state)

    def velocity(z, step):
        return head(z, context, table[:, step : step + 1], rope, geometry.mask, kv.keys, kv.values)

    step, steps = 2, 5
    rest = 1 - step / steps
    z, guide, way = torch.randn(3, 1, 8, 32)
    weights = guide_weights(torch.tensor([5]), torch.tensor([2]), 8)
    ones = torch.ones(1, 8, 32)
    with torch.no_grad():
        plain = velocity(z, step)
        pull = (guided_velocity(velocity, z, step, steps, ones, Guidance(guide, weights)) - plain) / guidance_scale(0.4)
        error = weights[..., None] * (guide - z - rest * plain)
        ends = [z + h * way + rest * velocity(z + h * way, step) for h in (-0.002, 0.002)]
        expected = ((ends[1] - ends[0]) / 0.004 * error).sum()
    assert float((pull * way).sum()) == pytest.approx(float(expected), rel=DIFFERENCES)
    assert (pull - error).abs().max() > 0.1  # J is not the identity
