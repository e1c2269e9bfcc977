"""Tensors whose elements are more than 2^31 apart, as the patches of many images are: no offset may be 32 bits wide.

What such an offset wraps around to lies in the same buffer, and is zero: a fault is a wrong number, not a crash.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels.products import EPS, LIBRARY, SPLIT, statistics, workspace
from tests.kernels.support import DEVICE, LOW_PRECISION_FACTOR, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import InputNorm, Residual, StatsOut, Tactic, Weight
from xr0_engine.kernels.attention import attention
from xr0_engine.kernels.embed import embed, layer_norm
from xr0_engine.kernels.lambda_attention import lambda_attention
from xr0_engine.kernels.linear import linear, swiglu
from xr0_engine.kernels.qkv import qkv

STEP = 2**30 + 64
"""Elements from one index to the next of the far dimension. As a stride it fits 32 bits, twice it does not."""
ROW_STEP = 2**25 + 64
"""Where a tile of neighbouring rows has its first at more than 2^31, and the others from there."""
ROOM = 2**16
"""Elements for each tensor, between the far ones."""
FLOAT16_ERROR = LOW_PRECISION_FACTOR * 2**-10
"""Of the largest magnitude: results and exponentials are rounded once each, to 11 bits."""

Far = Callable[..., Tensor]


@pytest.fixture
def far(tmp_path) -> Far:
    """Copies a tensor to where its indices of one dimension are `step` elements apart. All in one buffer of zeros."""
    elements = 2**31 + 72 * ROW_STEP
    if DEVICE.type == "cuda":
        buffer = torch.zeros(elements, dtype=torch.float16, device=DEVICE)
    else:
        # A file of which only what is written takes room.
        buffer = torch.from_file(str(tmp_path / "far"), shared=True, size=elements, dtype=torch.float16)
    used = 2**31

    def copy(x: Tensor, dimension: int, step: int = STEP) -> Tensor:
        nonlocal used
        strides = list(torch.empty(x.shape).stride())
        strides[dimension] = step
        view = buffer.as_strided(x.shape, strides, used)
        view.copy_(x)
        used += x.numel()
        assert used <= 2**31 + ROOM
        return view

    return copy


def assert_near(out: Tensor, exact: Tensor) -> None:
    error, largest = (out.float() - exact).abs().max().item(), exact.abs().max().item()
    assert error <= FLOAT16_ERROR * largest, f"error {error:.3g} of {largest:.3g}"


def half(*shape: int) -> Tensor:
    return randn(*shape, dtype=torch.float16)


DIMENSIONS = pytest.mark.parametrize("dimension", [0, 1], ids=["batches", "rows"])


@DIMENSIONS
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
def test_linear(tactic, dimension, far):
    torch.manual_seed(0)
    x, stream = (far(half(3, 3, columns), dimension) for columns in (40, 72))
    weight, norm = Weight(half(72, 40)), InputNorm(statistics(x), EPS)
    exact = torch.empty(3, 3, 72, device=DEVICE)
    run = {"norm": norm, "residual": Residual(stream), "tactic": tactic, "workspace": workspace()}
    fused_reference.linear(x, weight, exact, **run)
    linear(x, weight, stream, **run)
    assert_near(stream, exact)


@DIMENSIONS
def test_swiglu(dimension, far):
    torch.manual_seed(0)
    x, out, exact = half(3, 3, 40), far(half(3, 3, 32), dimension), torch.empty(3, 3, 32, device=DEVICE)
    weight = Weight(half(64, 40))
    for run, target in ((swiglu, out), (fused_reference.swiglu, exact)):
        run(x, weight, target, tactic=SPLIT.values[0], workspace=workspace())
    assert_near(out, exact)


@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batches", "heads", "rows"])
def test_qkv(dimension, far):
    torch.manual_seed(0)
    x, weight = half(3, 3, 40), Weight(half(9 * 16, 40))
    cos, sin = torch.randn(2, 3, 3, 8).to(DEVICE)
    outs = [far(half(3, 3, 3, 16), dimension) for _ in range(3)]
    exact = [torch.empty(3, 3, 3, 16, device=DEVICE) for _ in range(3)]
    for run, targets in ((qkv, outs), (fused_reference.qkv, exact)):
        run(x, weight, *targets, cos=cos, sin=sin, tactic=SPLIT.values[0], workspace=workspace())
    for out, part in zip(outs, exact, strict=True):
        assert_near(out, part)


@pytest.mark.parametrize("dimension", [0, 1], ids=["batches", "heads"])
def test_attention(dimension, far):
    torch.manual_seed(0)
    q, k, v = (far(half(3, 3, 3, 16), dimension) for _ in range(3))
    out, exact = far(half(3, 3, 48), 0), torch.empty(3, 3, 48, device=DEVICE)
    for run, target in ((attention, out), (fused_reference.attention, exact)):
        run(q, k, v, target, causal=True, tactic=Tactic(16, 16), workspace=workspace())
    assert_near(out, exact)


def test_attention_of_far_rows(far):
    torch.manual_seed(0)
    q, k, v = far(half(1, 2, 70, 16), 2, ROW_STEP), half(1, 1, 5, 16), half(1, 1, 5, 16)
    out, exact = far(half(1, 70, 32), 1, ROW_STEP), torch.empty(1, 70, 32, device=DEVICE)
    for run, target in ((attention, out), (fused_reference.attention, exact)):
        run(q, k, v, target, causal=False, tactic=Tactic(16, 16), workspace=workspace())
    assert_near(out, exact)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("dimension", [0, 1], ids=["batches", "KV heads"])
def test_lambda_attention(dimension, splits, far):
    torch.manual_seed(0)
    q, k, v = half(3, 3, 3, 3, 16)
    keys, values = (far(half(3, 3, 20, 16), dimension) for _ in range(2))
    begin, end = (torch.full((3,), place, dtype=torch.int32, device=DEVICE) for place in (2, 19))
    out, exact = far(half(3, 3, 48), 0), torch.empty(3, 3, 48, device=DEVICE)
    options = {"window": None, "context": 1, "tactic": Tactic(16, 16, split_k=splits), "workspace": workspace()}
    for run, target in ((lambda_attention, out), (fused_reference.lambda_attention, exact)):
        run(q, k, v, keys, values, begin, end, target, **options)
    assert_near(out, exact)


@DIMENSIONS
def test_layer_norm(dimension, far):
    torch.manual_seed(0)
    x, out, exact = far(half(3, 3, 40), dimension), far(half(3, 3, 40), dimension), torch.empty(3, 3, 40, device=DEVICE)
    weight, bias = half(2, 40)
    for run, target in ((layer_norm, out), (fused_reference.layer_norm, exact)):
        run(x, weight, bias, EPS, target)
    assert_near(out, exact)


@DIMENSIONS
def test_embed(dimension, far):
    torch.manual_seed(0)
    table, image_tokens, out = far(half(3, 40), 0), far(half(3, 40), 0), far(half(3, 3, 40), dimension)
    ids = torch.tensor([[2, 1, 0]], dtype=torch.int32, device=DEVICE).expand(3, 3)
    image_index = torch.tensor([[-1, 2, 1]], dtype=torch.int32, device=DEVICE).expand(3, 3)
    embed(ids, table, image_index, image_tokens, out, StatsOut(torch.zeros(1, 3, 3, 2, device=DEVICE)))
    assert torch.equal(out, torch.stack((table[2], image_tokens[2], image_tokens[1])).expand(3, 3, 40))
