"""Embedding, rotary tables and layer norm against their oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.support import DEVICE, DTYPES, Frame, assert_as_plain, assert_close, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import StatsOut
from xr0_engine.kernels.embed import embed, layer_norm, rope_tables

EPS = 1e-6


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 5, 64), (3, 3, 200), (2, 2, 1100)])
def test_embed(batch, rows, columns, dtype, weighted):
    torch.manual_seed(0)
    table, image_tokens = randn(11, columns, dtype=dtype), randn(4, columns, dtype=dtype)
    ids = torch.randint(0, 11, (batch, rows), dtype=torch.int32, device=DEVICE)
    image_index = torch.randint(-3, 4, (batch, rows), device=DEVICE).clamp(min=-1).int()
    # Where an image token stands, the id is whatever the tokenizer has for it.
    ids[image_index >= 0] = 2_000_000_000
    weight = torch.rand(columns, device=DEVICE) + 0.5 if weighted else None
    slots = -(-columns // 64)
    out, sums = Frame(batch, rows, columns, dtype=dtype), Frame(slots, batch, rows, 2)
    if weight is None:
        sums.view[..., 1] = 0
    embed(ids, table, image_index, image_tokens, out.view, StatsOut(sums.view, weight))
    expected, expected_sums = torch.empty_like(out.view), torch.zeros_like(sums.view)
    ids[image_index >= 0] = 0
    fused_reference.embed(ids, table, image_index, image_tokens, expected, StatsOut(expected_sums, weight))
    assert torch.equal(out.result(), expected)
    assert_close(sums.result(), expected_sums)


@pytest.mark.parametrize(("batch", "rows", "half"), [(1, 1, 8), (2, 19, 64), (3, 8, 20)])
def test_rope_tables(batch, rows, half):
    torch.manual_seed(0)
    positions = torch.randint(0, 99_000, (3, batch, rows), dtype=torch.int32, device=DEVICE)
    frequencies = 5e6 ** -torch.linspace(0, 1, half, device=DEVICE)
    axes = torch.arange(half, dtype=torch.int32, device=DEVICE) % 3
    cos, sin = Frame(batch, rows, half), Frame(batch, rows, half)
    rope_tables(positions, frequencies, axes, cos.view, sin.view)
    expected = torch.empty(2, batch, rows, half, device=DEVICE)
    fused_reference.rope_tables(positions, frequencies, axes, *expected)
    assert_close(cos.result(), expected[0])
    assert_close(sin.result(), expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "rows", "columns"), [(1, 3, 32), (2, 2, 77), (1, 2, 4096)])
def test_layer_norm(batch, rows, columns, dtype):
    torch.manual_seed(0)
    # Far from zero mean: statistics taken in one pass would lose digits.
    x = randn(batch, rows, columns, dtype=dtype) + 5
    weight, bias = torch.randn(2, columns).to(DEVICE, dtype)
    out, exact = Frame(batch, rows, columns, dtype=dtype), torch.empty(batch, rows, columns, device=DEVICE)
    layer_norm(x, weight, bias, EPS, out.view)
    fused_reference.layer_norm(x, weight, bias, EPS, exact)
    assert_as_plain(out.result(), exact, F.layer_norm(x, (columns,), weight, bias, EPS))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"out": (1, 2, 65)}, r"out: expected shape \(1, 2, 64\), got \(1, 2, 65\)"),
        ({"image_tokens": (4, 63)}, r"image_tokens: expected shape \(4, 64\)"),
        ({"sums": (2, 1, 2, 2)}, r"stats.sums: expected shape \(1, 1, 2, 2\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_shapes_are_refused(change, complaint):
    shapes = {"image_tokens": (4, 64), "out": (1, 2, 64), "sums": (1, 1, 2, 2)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    ids = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=complaint):
        embed(ids, torch.zeros(9, 64), ids, tensors["image_tokens"], tensors["out"], StatsOut(tensors["sums"]))


def test_embed_has_no_centred_sums():
    ids, sums = torch.zeros(1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2)
    with pytest.raises(NotImplementedError, match=r"stats\.centred: embed has none"):
        embed(ids, torch.zeros(9, 64), ids, torch.zeros(4, 64), torch.zeros(1, 2, 64), StatsOut(sums, centred=True))


def test_scattered_columns_are_refused():
    x = torch.zeros(1, 64, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="x: expected a contiguous last dimension"):
        layer_norm(x, torch.ones(64), torch.ones(64), EPS, torch.empty(1, 2, 64))
