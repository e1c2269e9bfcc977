"""What an op's contract allows, every schedule takes: each launches kernels of its own from the same call."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.products import EPS, workspace
from tests.kernels.support import DEVICE, Frame, assert_close
from xr0_engine.env import emulated_arch
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import InputNorm, Tactic, Weight
from xr0_engine.kernels.launch import INTERPRETED
from xr0_engine.kernels.linear import linear

ROWS, INPUTS, OUTPUTS = 20, 128, 64
SCHEDULES = {
    "tiled": Tactic(32, 64, 64, warps=4, stages=2),
    "stream": Tactic(32, 64, 64, split_k=3, warps=4, stages=2, schedule="stream"),
    "whole": Tactic(32, 16, 64, warps=4, stages=2, schedule="whole"),
    "tma": Tactic(64, 64, 64, warps=4, stages=2, schedule="tma"),
    "swapped": Tactic(64, 64, 64, warps=4, stages=2, schedule="swapped"),
}


@pytest.mark.parametrize("slot", [16, 32, 64])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sums_of_narrow_slots_and_a_scaled_weight(schedule, slot):
    """The norm needs all slots, however wide: only the first would be another norm."""
    if schedule == "tma" and (emulated_arch() or 90) < 90:
        pytest.skip("needs a chip with TMA")
    if schedule == "swapped" and (INTERPRETED or emulated_arch() not in (None, 90)):
        pytest.skip("needs a chip whose warpgroups multiply, and no interpreter runs Gluon")
    torch.manual_seed(slot)
    # The later columns weigh more: a part of the slots is no guess at all of the whole.
    x = (torch.randn(1, ROWS, INPUTS) * torch.arange(1, INPUTS + 1)).to(DEVICE, torch.float16)
    sums = torch.full((INPUTS // slot, 1, ROWS, 2), torch.nan, device=DEVICE)
    sums[..., 0] = x.float().square().unflatten(-1, (-1, slot)).sum(-1).permute(2, 0, 1)
    data, scale = torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5, 0.5 + torch.rand(OUTPUTS)
    weight = Weight(data.to(DEVICE, torch.float16), scale.to(DEVICE))
    options = {"norm": InputNorm(sums, EPS), "tactic": SCHEDULES[schedule], "workspace": workspace()}
    out, exact = Frame(1, ROWS, OUTPUTS, dtype=torch.float16), torch.empty(1, ROWS, OUTPUTS, device=DEVICE)
    linear(x, weight, out.view, **options)
    fused_reference.linear(x, weight, exact, **options)
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    plain = (normed.half().float() @ weight.data.float().T * weight.scale).half()
    assert_close(out.result(), exact, plain)
