"""Fused queries, keys and values against their oracle, and the oracle against the textbook."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.products import EPS, LIBRARY, SPLIT, TACTICS, Product, workspace
from tests.kernels.support import DEVICE, DTYPES, Frame, assert_close, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import Tactic, Weight
from xr0_engine.kernels.qkv import qkv

# (B, M, K, H, G, D)
SHAPES = [
    pytest.param((1, 12, 64, 1, 1, 32), id="1x12, 1 head of 32"),
    pytest.param((3, 7, 40, 2, 1, 16), id="3x7, 2 heads of 16 for 1"),
    pytest.param((1, 3, 32, 1, 1, 128), id="1x3, 1 head of 128"),
]
SMALL = (2, 5, 40, 2, 1, 16)

# What the model puts before the product and after it.
USES = {
    "vision": {"kind": "layer", "bias": True, "head_norms": False},
    "vlm": {"kind": "rms", "head_norms": True},
    "vlm, last layer": {"kind": "rms", "head_norms": True, "queries": False},
    "dit": {"kind": "double_rms", "bias": True, "col_scale": True, "head_norms": True},
}


def make_case(shape, dtype, kind, head_norms, bias=False, col_scale=False, queries=True, x_dtype=None):
    """(product, number of q heads, arguments of qkv behind v)."""
    torch.manual_seed(0)
    batch, rows, inputs, heads, groups, dim = shape
    heads = heads if queries else 0
    outputs = (heads + 2 * groups) * dim
    product = Product.make((batch, rows, inputs, outputs), dtype, kind, bias, col_scale, x_dtype)
    # One table for all batches, as where all prompts stand at the same place.
    angles = (3 * torch.randn(1, rows, dim // 2)).to(DEVICE)
    cos, sin = (table.expand(batch, -1, -1) for table in (angles.cos(), angles.sin()))
    q_weight, k_weight = (1 + 0.2 * randn(2, dim)).to(dtype) if head_norms else (None, None)
    rest = {"q_weight": q_weight, "k_weight": k_weight, "eps": EPS, "cos": cos, "sin": sin}
    return product, heads, {**product.arguments, **rest}


def textbook(product, heads, groups, arguments, dtype):
    """[q, k, v], in dtype throughout."""
    dim = arguments["cos"].shape[-1] * 2
    y = product.textbook(dtype).unflatten(-1, (-1, dim)).transpose(1, 2)
    q, k, v = y.split((heads, groups, groups), dim=1)
    cos, sin = (arguments[name].to(dtype)[:, None] for name in ("cos", "sin"))

    def prepared(x, weight):
        if weight is not None:
            x = F.rms_norm(x, (dim,), weight.to(dtype), EPS)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return [prepared(q, arguments["q_weight"]), prepared(k, arguments["k_weight"]), v]


def oracle(product, heads, groups, arguments):
    """[q, k, v] in float32."""
    batch, rows = product.x.shape[:2]
    dim = arguments["cos"].shape[-1] * 2
    q, k, v = (torch.empty(batch, count, rows, dim, device=DEVICE) for count in (heads, groups, groups))
    run = {"tactic": Tactic(), "workspace": workspace()}
    fused_reference.qkv(product.x, product.weight, q if heads else None, k, v, **arguments, **run)
    return [q, k, v]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_oracle_is_the_textbook(use):
    product, heads, arguments = make_case((2, 5, 100, 4, 2, 16), torch.float32, **use)
    expected = textbook(product, heads, 2, arguments, torch.float64)
    for out, part in zip(oracle(product, heads, 2, arguments), expected, strict=True):
        if part.numel():
            assert_close(out, part.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_qkv(use, tactic, dtype):
    check_qkv(SMALL, dtype, tactic, use)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float16"])
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_qkv_shapes(shape, tactic, dtype):
    check_qkv(shape, dtype, tactic, USES["dit"])


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
def test_qkv_of_a_float32_stream(tactic, dtype):
    check_qkv(SMALL, dtype, tactic, USES["dit"] | {"x_dtype": torch.float32})


def check_qkv(shape, dtype, tactic, use, adjacent=False):
    """adjacent: whether the batches of x follow each other."""
    batch, rows, _, _, groups, dim = shape
    product, heads, arguments = make_case(shape, dtype, **use)
    if adjacent:
        product = replace(product, x=product.x.contiguous())
    # A frame's rows, heads and batches are not adjacent: they lie like slices of a larger KV block.
    q, k, v = (Frame(batch, count, rows, dim, dtype=dtype) for count in (heads, groups, groups))
    run = {"tactic": tactic, "workspace": workspace()}
    qkv(product.x, product.weight, q.view if heads else None, k.view, v.view, **arguments, **run)
    exact, plain = oracle(product, heads, groups, arguments), textbook(product, heads, groups, arguments, dtype)
    for out, exact_part, plain_part in zip((q, k, v), exact, plain, strict=True):
        if exact_part.numel():
            assert_close(out.result(), exact_part, None if dtype == torch.float32 else plain_part)


@pytest.mark.parametrize("dtype", [p for p in DTYPES if p.id != "float32"])
def test_eight_bit_weights(dtype):
    product, heads, arguments = make_case(SMALL, dtype, **USES["vlm"])
    data = torch.randint(-127, 128, product.weight.data.shape, dtype=torch.int8, device=DEVICE)
    product.weight = Weight(data, 0.001 + 0.001 * torch.rand(len(data), device=DEVICE))
    q, k, v = (Frame(2, count, 5, 16, dtype=dtype) for count in (2, 1, 1))
    run = {"tactic": SPLIT.values[0], "workspace": workspace()}
    qkv(product.x, product.weight, q.view, k.view, v.view, **arguments, **run)
    exact, plain = oracle(product, heads, 1, arguments), textbook(product, heads, 1, arguments, dtype)
    for out, exact_part, plain_part in zip((q, k, v), exact, plain, strict=True):
        assert_close(out.result(), exact_part, plain_part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"q": torch.empty(1, 2, 3, 8)}, r"q: expected shape \(1, 2, 3, 16\), got \(1, 2, 3, 8\)", id="q"),
        pytest.param({"v": torch.empty(1, 2, 3, 16)}, r"v: expected shape \(1, 1, 3, 16\)", id="v"),
        pytest.param({"q": None}, r"weight.data: expected 2 heads of 16 rows, got 64 rows", id="no q"),
        pytest.param({"cos": torch.empty(1, 3, 16)}, r"cos: expected shape \(1, 3, 8\)", id="cos"),
        pytest.param({"k_weight": torch.empty(8)}, r"k_weight: expected shape \(16,\)", id="k_weight"),
        pytest.param({"k": torch.empty(1, 1, 3, 24)}, "head_dim: expected a power of two", id="head_dim"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {
        "x": torch.empty(1, 3, 32),
        "weight": Weight(torch.empty(64, 32)),
        "q": torch.empty(1, 2, 3, 16),
        "k": torch.empty(1, 1, 3, 16),
        "v": torch.empty(1, 1, 3, 16),
        "cos": torch.empty(1, 3, 8),
        "sin": torch.empty(1, 3, 8),
        "tactic": Tactic(16, 64, 32),
        "workspace": workspace(),
    }
    with pytest.raises(ValueError, match=message):
        qkv(**{**arguments, **change})
