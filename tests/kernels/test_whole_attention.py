"""lambda_attention by the schedule "whole" against its oracle: keys shared out over a program's warps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.products import EPS
from tests.kernels.support import DEVICE, DTYPES, Frame, assert_as_plain, assert_close, randn
from tests.kernels.test_attention import LAMBDA_SIZES, lambda_case, plain_lambda
from xr0_engine.kernels import fused_reference, reference
from xr0_engine.kernels.arguments import Heads, Tactic, Workspace
from xr0_engine.kernels.lambda_attention import lambda_attention

WHOLE = Tactic(block_m=16, block_n=16, warps=2, schedule="whole")
"""Two steps of 32 keys hold the 50 of the longest case."""


def check(case, dtype, window, context, tactic, heads=None):
    batch, count, queries, dim = case[0].shape
    shape = (batch, queries, count * dim)
    common = {"window": window, "context": context, "workspace": Workspace(DEVICE), "tactic": tactic, "heads": heads}
    out, exact = Frame(*shape, dtype=dtype), torch.empty(shape, device=DEVICE)
    lambda_attention(*case, out.view, **common)
    fused_reference.lambda_attention(*case, exact, **common)
    return out.result(), exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "groups", "queries", "cached", "dim"), LAMBDA_SIZES)
def test_lambda_attention(batch, heads, groups, queries, cached, dim, dtype):
    torch.manual_seed(0)
    case = lambda_case(batch, heads, groups, queries, cached, dim, dtype)
    out, exact = check(case, dtype, 3, 1, WHOLE)
    assert_as_plain(out, exact, plain_lambda(*case, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "groups", "queries", "cached", "dim"), LAMBDA_SIZES[:2])
def test_heads_are_normalised_and_rotated(batch, heads, groups, queries, cached, dim, dtype):
    torch.manual_seed(0)
    raw = randn(batch, queries, 3, heads, dim, scale=2).permute(2, 0, 3, 1, 4)
    _, _, _, *cache = lambda_case(batch, heads, groups, queries, cached, dim, dtype)
    angle = randn(batch, queries, dim // 2)
    table = Heads(1 + 0.2 * randn(dim), 1 + 0.2 * randn(dim), EPS, angle.cos(), angle.sin())
    out, exact = check((*raw, *cache), dtype, 3, 1, WHOLE, table)
    cos, sin = (x.repeat(1, 1, 2)[:, None] for x in (table.cos, table.sin))
    q = reference.rotate(reference.rms_norm(raw[0], table.q_weight, EPS), cos, sin)
    k = reference.rotate(reference.rms_norm(raw[1], table.k_weight, EPS), cos, sin)
    assert_as_plain(out, exact, plain_lambda(q.to(dtype), k.to(dtype), raw[2].to(dtype), *cache, 3, 1))


def test_valid_range_is_read_on_the_device():
    torch.manual_seed(0)
    q, k, v, keys, values, begin, end = lambda_case(1, 2, 2, 5, 40, 16, torch.float32)
    keys, values = keys.nan_to_num(0.5), values.nan_to_num(0.5)
    for first, last in ((0, 40), (39, 40), (8, 8), (30, 10), (-5, 7), (33, 99), (45, 60), (-9, -3)):
        begin[0], end[0] = first, last
        assert_close(*check((q, k, v, keys, values, begin, end), torch.float32, None, 2, WHOLE))


def test_what_it_cannot_do_is_refused():
    case = lambda_case(1, 2, 2, 3, 8, 16, torch.float32)
    with pytest.raises(ValueError, match=r"tactic\.split_k: expected 1 with schedule 'whole', got 2"):
        check(case, torch.float32, None, 2, replace(WHOLE, split_k=2))
    with pytest.raises(NotImplementedError, match="expected 'tiled' or 'whole', got 'tma'"):
        check(case, torch.float32, None, 2, replace(WHOLE, schedule="tma"))
    angle, weight = randn(1, 3, 8), randn(16)
    with pytest.raises(NotImplementedError, match="'whole' does both"):
        check(case, torch.float32, None, 2, Tactic(16, 16), Heads(weight, weight, EPS, angle, angle))
