"""The oracles against plain restatements in float64."""

from __future__ import annotations

import math

import pytest
import torch

from xr0_engine.kernels.reference import attention, lambda_attention, rms_norm, rotate

FLOAT32_ERROR = 1e-5
"""A few hundred float32 additions of values of order 1."""
BFLOAT16_ERROR = 3e-2
"""Four bfloat16 roundings (2^-8 each) on values up to 2."""


def plain_attention(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "heads", "groups", "queries", "cached", "dim"),
    [(1, 8, 8, 32, 194, 128), (2, 4, 2, 12, 27, 16), (3, 6, 1, 1, 1, 8), (1, 2, 1, 66, 315, 32)],
)
def test_lambda_attention(batch, heads, groups, queries, cached, dim, dtype):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, queries, dim, dtype=dtype)
    kv = torch.randn(2, batch, cached, groups, dim, dtype=dtype).transpose(2, 3)  # strided, as a cache may be
    mask = torch.rand(batch, 1, queries, cached + queries) < 0.6
    mask[..., torch.arange(queries), cached + torch.arange(queries)] = True
    out = lambda_attention(q, k, v, kv[0], kv[1], mask)
    double = [x.double() for x in (q, k, v, kv[0], kv[1])]
    repeat = heads // groups
    keys = torch.cat((double[3].repeat_interleave(repeat, 1), double[1]), 2)
    values = torch.cat((double[4].repeat_interleave(repeat, 1), double[2]), 2)
    expected = plain_attention(double[0], keys, values, mask)
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < (FLOAT32_ERROR if dtype == torch.float32 else BFLOAT16_ERROR)


@pytest.mark.parametrize("causal", [False, True], ids=["mask", "causal"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_attention(groups, causal):
    torch.manual_seed(0)
    q, kv = torch.randn(2, 6, 21, 16), torch.randn(2, 2, groups, 21, 16)
    mask = torch.ones(21, 21, dtype=torch.bool).tril() if causal else torch.rand(2, 1, 21, 21) < 0.7
    out = attention(q, kv[0], kv[1], None if causal else mask, causal)
    expected = plain_attention(q.double(), kv[0].double(), kv[1].double(), mask)
    assert (out.double() - expected).abs().max() < FLOAT32_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norm_rounds_before_the_weight(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 48, dtype=dtype) * 3, torch.randn(48, dtype=dtype)
    out = rms_norm(x, weight, 1e-6)
    normed = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    if dtype == torch.bfloat16:
        # Statistics in float32 may round to the other neighbour: one unit in the last place of bfloat16, twice.
        torch.testing.assert_close(out, normed.to(dtype) * weight, rtol=2**-7, atol=0)
    else:
        assert (out.double() - normed * weight.double()).abs().max() < FLOAT32_ERROR


def test_rotate_turns_pairs_and_keeps_lengths():
    torch.manual_seed(0)
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 4)
    both = torch.cat((angles, angles), -1)
    out = rotate(x, both.cos(), both.sin())
    pair = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(out, torch.cat((pair.real, pair.imag), -1))
