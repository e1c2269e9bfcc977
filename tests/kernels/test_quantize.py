"""Rows in 8 bits, against the reference's, and products of them by 8-bit weights, whose sums of int8 are exact."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.products import EPS, statistics, workspace
from tests.kernels.support import DEVICE, Frame, assert_close, randn, spread
from tests.kernels.test_linear import make_residual
from xr0_engine.env import emulated_arch
from xr0_engine.fused.products import LEAST_CAPABILITY
from xr0_engine.kernels import fused_reference, reference
from xr0_engine.kernels.arguments import InputNorm, Tactic, Weight
from xr0_engine.kernels.linear import linear, swiglu
from xr0_engine.kernels.qkv import qkv
from xr0_engine.kernels.quantize import quantize

FLOAT8 = pytest.mark.skipif(
    (emulated_arch() or 90) < LEAST_CAPABILITY["fp8"], reason="needs a chip with float8, from sm_89 on"
)
FORMATS = [pytest.param(torch.int8, id="int8"), pytest.param(torch.float8_e4m3fn, id="float8", marks=FLOAT8)]
ONE_STEP = {torch.int8: 1.0, torch.float8_e4m3fn: 32.0}
"""Of 8 bits, where float32 differs in its last bits and a value lies between two: float8's largest are 32 apart."""

TACTICS = [
    pytest.param(Tactic(16, 64, 64), id="whole K"),
    pytest.param(Tactic(16, 64, 32, split_k=3), id="split K"),
    pytest.param(Tactic(64, 64, 32, split_k=5, schedule="stream"), id="stream"),
    pytest.param(Tactic(128, 64, 64, schedule="stream"), id="stream, a tile each"),
]
SHAPE = (2, 40, 136, 72)
"""(B, M, K, N): 80 rows in pieces of 16 and 64, none of the sizes a multiple of its block."""


def eight_bits(shape, format):
    """x, its scale and the weight of (B, M, K, N)."""
    torch.manual_seed(0)
    batch, rows, inputs, outputs = shape
    # Of int8 sums that float32 does not hold in any order.
    x, scale = reference.quantize_rows(torch.randn(batch, rows, inputs, device=DEVICE) + 2, format)
    data, weight_scale = reference.quantize_rows(torch.randn(outputs, inputs, device=DEVICE) + 1, format)
    return spread_bits(x), spread(scale), Weight(spread_bits(data), weight_scale)


def spread_bits(x):
    """The same values with others behind each row."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + 16), 127, dtype=torch.int8, device=x.device).view(x.dtype)
    view = room[..., : x.shape[-1]]
    view.copy_(x)
    return view


def run(x, format, **options):
    """quantize, and its oracle: (q, scale) of each."""
    found = []
    for op in (quantize, fused_reference.quantize):
        out, scale = torch.empty(x.shape, dtype=format, device=DEVICE), Frame(*x.shape[:2])
        op(x, out, scale.view, **options)
        found.append((out, scale.result()))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("columns", [64, 200, 1024])
def test_rows_are_the_references(columns, dtype, format):
    torch.manual_seed(0)
    x = randn(2, 5, columns, dtype=dtype, scale=3.0)
    out, scale = run(x, format)[0]
    expected, expected_scale = reference.quantize_rows(x, format)
    assert torch.equal(out.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("format", FORMATS)
def test_columns_scaled_and_shifted_are_the_references(format):
    torch.manual_seed(0)
    x, options = randn(2, 5, 200), {"col_scale": 1 + 0.2 * randn(200), "bias": randn(200)}
    (out, scale), (expected, expected_scale) = run(x, format, **options)
    assert torch.equal(out.view(torch.int8), expected.view(torch.int8))
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["rms", "layer", "double_rms"])
def test_rows_are_normalised_first(kind, format):
    torch.manual_seed(0)
    x = randn(2, 5, 200) + 0.5
    ones = torch.ones(200, device=DEVICE) if kind == "double_rms" else None
    norm = InputNorm(statistics(x, ones, kind == "layer"), EPS, kind)
    options = {"norm": norm, "col_scale": 1 + 0.2 * randn(200), "bias": randn(200) if kind == "layer" else None}
    (out, scale), (expected, expected_scale) = run(x, format, **options)
    assert_close(scale, expected_scale)
    assert (out.float() - expected.float()).abs().max() <= ONE_STEP[format]


def test_ties_go_to_even():
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.0], device=DEVICE).view(1, 1, 8)
    (out, scale), _ = run(x, torch.int8)
    assert out.flatten().tolist() == [127, 0, 2, 2, 0, -2, 126, -127]
    assert scale.item() == 1.0


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_zeros_is_zero(format):
    (out, scale), (_, expected) = run(torch.zeros(1, 2, 64, device=DEVICE), format)
    assert not out.float().any()
    assert torch.equal(scale, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(wrong):
    x = torch.ones(1, 2, 64, device=DEVICE)
    x[0, 1, 5] = wrong
    out, scale = torch.empty(1, 2, 64, dtype=torch.int8, device=DEVICE), torch.empty(1, 2, device=DEVICE)
    quantize(x, out, scale)
    assert scale.isfinite().tolist() == [[True, False]]


@pytest.mark.parametrize("tactic", TACTICS)
def test_int8_products_are_the_references_bit_for_bit(tactic):
    x, x_scale, weight = eight_bits(SHAPE, torch.int8)
    bias, out = randn(SHAPE[3]), Frame(2, 40, SHAPE[3])
    linear(x, weight, out.view, x_scale=x_scale, bias=bias, tactic=tactic, workspace=workspace())
    expected = reference.product_8bit(x.flatten(0, 1), x_scale.flatten(), weight.data, weight.scale) + bias
    assert torch.equal(out.result(), expected.view(2, 40, -1))


@pytest.mark.parametrize("tactic", TACTICS[1:3])
def test_int8_sums_beyond_float32_are_exact(tactic):
    """All of 127 but one: odd sums of more than 24 bits."""
    x = torch.full((1, 17, 2080), 127, dtype=torch.int8, device=DEVICE)
    x[..., 0] = 1
    weight = Weight(torch.full((64, 2080), 127, dtype=torch.int8, device=DEVICE), torch.ones(64, device=DEVICE))
    out = torch.empty(1, 17, 64, device=DEVICE)
    linear(x, weight, out, x_scale=torch.ones(1, 17, device=DEVICE), tactic=tactic, workspace=workspace())
    assert (out == torch.tensor(127 * (2079 * 127 + 1), dtype=torch.float32)).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS)
def test_linear_with_what_surrounds_it(tactic, format):
    x, x_scale, weight = eight_bits(SHAPE, format)
    residual = make_residual("gated", 2, 40, SHAPE[3], torch.float32)
    options = {"x_scale": x_scale, "bias": randn(SHAPE[3]), "activation": "gelu_tanh", "residual": residual}
    out, exact = Frame(2, 40, SHAPE[3]), torch.empty(2, 40, SHAPE[3], device=DEVICE)
    for op, target in ((linear, out.view), (fused_reference.linear, exact)):
        op(x, weight, target, **options, tactic=tactic, workspace=workspace())
    assert_close(out.result(), exact)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS[1:3])
def test_swiglu(tactic, format):
    x, x_scale, weight = eight_bits(SHAPE, format)
    out, exact = Frame(2, 40, 36), torch.empty(2, 40, 36, device=DEVICE)
    for op, target in ((swiglu, out.view), (fused_reference.swiglu, exact)):
        op(x, weight, target, x_scale=x_scale, tactic=tactic, workspace=workspace())
    assert_close(out.result(), exact)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tactic", TACTICS[1:3])
def test_qkv(tactic, format):
    x, x_scale, weight = eight_bits((2, 20, 72, 4 * 32), format)
    angle = randn(2, 20, 16)
    options = {"x_scale": x_scale, "q_weight": 1 + 0.2 * randn(32), "cos": angle.cos(), "sin": angle.sin()}
    found = []
    for op in (qkv, fused_reference.qkv):
        parts = [Frame(2, heads, 20, 32) for heads in (2, 1, 1)]
        op(x, weight, *(part.view for part in parts), **options, tactic=tactic, workspace=workspace())
        found.append([part.result() for part in parts])
    for part, exact in zip(*found, strict=True):
        assert_close(part, exact)


def test_split_sums_leave_counters_zero():
    x, x_scale, weight = eight_bits((2, 4, 80, 72), torch.int8)
    out, scratch = torch.empty(2, 4, 72, device=DEVICE), workspace()
    linear(x, weight, out, x_scale=x_scale, tactic=Tactic(16, 64, 32, split_k=3), workspace=scratch)
    assert not scratch.counters(2).any()


GIVEN = {
    "x": torch.empty(1, 2, 32, dtype=torch.int8),
    "weight": Weight(torch.empty(64, 32, dtype=torch.int8), torch.empty(64)),
    "out": torch.empty(1, 2, 64),
    "x_scale": torch.empty(1, 2),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x_scale": None}, "x_scale: expected for torch.int8, got None", id="no scale"),
        pytest.param({"x_scale": torch.empty(2, 1)}, r"x_scale: expected shape \(1, 2\)", id="scale's shape"),
        pytest.param({"x_scale": torch.empty(1, 2).half()}, "x_scale: expected float32", id="scale's dtype"),
        pytest.param({"x": torch.empty(1, 2, 32)}, "x: expected int8 or float8_e4m3fn with x_scale", id="x"),
        pytest.param({"weight": Weight(torch.empty(64, 32))}, "weight.data: expected x's torch.int8", id="weight"),
        pytest.param(
            {"weight": Weight(GIVEN["weight"].data)},
            "weight.scale: expected for torch.int8, got None",
            id="half a weight",
        ),
        pytest.param({"norm": InputNorm(torch.empty(1, 1, 2, 2), EPS)}, "norm: expected None with x_scale", id="norm"),
        pytest.param({"col_scale": torch.empty(32)}, "col_scale: expected None with x_scale", id="col_scale"),
        pytest.param({"tactic": Tactic(16, 64, 16)}, "block_k: expected a power of two of at least 32", id="block_k"),
    ],
)
def test_wrong_arguments_of_products(change, message):
    with pytest.raises(ValueError, match=message):
        linear(**GIVEN | {"tactic": Tactic(16, 64, 32), "workspace": workspace()} | change)


@pytest.mark.parametrize("tactic", [Tactic(schedule="whole"), Tactic(schedule="tma"), Tactic(library=True)])
def test_other_schedules_refuse(tactic):
    with pytest.raises(NotImplementedError, match=tactic.schedule if not tactic.library else "library"):
        linear(**GIVEN, tactic=tactic, workspace=workspace())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"x": torch.empty(1, 2, 32, dtype=torch.int8)}, "x: expected floating point", id="x"),
        pytest.param({"out": torch.empty(1, 2, 32)}, "out: expected int8 or float8_e4m3fn", id="out"),
        pytest.param({"scale": torch.empty(1, 3)}, r"scale: expected shape \(1, 2\)", id="scale"),
        pytest.param({"bias": torch.empty(31)}, r"bias: expected shape \(32,\)", id="bias"),
        pytest.param({"norm": InputNorm(torch.empty(3, 1, 2, 2), EPS)}, "norm.sums: expected 1, 1, 2 slots", id="sums"),
    ],
)
def test_wrong_arguments_of_rows(change, message):
    given = {"x": torch.empty(1, 2, 32), "out": torch.empty(1, 2, 32, dtype=torch.int8), "scale": torch.empty(1, 2)}
    with pytest.raises(ValueError, match=message):
        quantize(**given | change)


def test_rows_may_be_too_long():
    x = torch.empty(1, 1, 16385)
    with pytest.raises(NotImplementedError, match="at most 16384 columns"):
        quantize(x, x.to(torch.int8), torch.empty(1, 1))
