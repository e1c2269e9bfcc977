"""Norms around products where numbers are extreme: rows far from zero mean, rows that float16 holds only normalised.

Each is judged against float64, and allowed what PyTorch makes of it in the order of the released model: the row
normalised in float32, rounded, multiplied, rounded.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels.products import LIBRARY, SPLIT, statistics, workspace
from tests.kernels.support import DEVICE, DTYPES, FLOAT32_ERROR, LOW_PRECISION_FACTOR, randn
from xr0_engine.kernels import fused_reference
from xr0_engine.kernels.arguments import InputNorm, Residual, StatsOut, Tactic, Weight
from xr0_engine.kernels.linear import linear, swiglu
from xr0_engine.kernels.qkv import qkv

EPS = 1e-6
INPUTS, OUTPUTS = 1100, 64
"""The last of the slots of statistics is not full."""
UNCENTRED_ERROR = 2**-17
"""Times a row's |mean| / std: the product is added up before the mean is taken off, in some 100 roundings of 2^-24."""

ROWS = {
    "plain": lambda x: x,
    # As a vision tower's, whose few large channels are the same in every row.
    "large channels": lambda x: x + torch.zeros(INPUTS, device=DEVICE).index_fill(0, LARGE, 400.0),
    "mean of 30 deviations": lambda x: x + 30,
    "mean of 100 deviations": lambda x: x - 100,
    "mean of 10,000 deviations": lambda x: 0.1 * x + 1000,
    "all the same": lambda x: torch.full_like(x, 0.125),
    "zero": torch.zeros_like,
}
LARGE = torch.tensor([7, 100, 901], device=DEVICE)


def largest_error(result: Tensor, exact: Tensor) -> Tensor:
    return (result.double() - exact).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm_of_rows_far_from_zero(rows, tactic, dtype):
    """The rows are written, with their statistics, by one product, and read by another."""
    torch.manual_seed(0)
    stream = ROWS[rows](torch.randn(2, 9, INPUTS, device=DEVICE))
    sums = torch.full((18, 2, 9, 2), torch.nan, device=DEVICE)
    assert_normalised(written(stream, sums, dtype, tactic), sums, tactic)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
def test_layer_norm_of_merged_rows(tactic, dtype):
    """Four neighbouring rows are read as one, whose slots theirs are: 36, more than are taken at once."""
    torch.manual_seed(0)
    stream = ROWS["large channels"](torch.randn(1, 12, INPUTS, device=DEVICE))[..., :576].contiguous()
    slots = torch.full((1, 12, 9, 2), torch.nan, device=DEVICE)
    x = written(stream, slots.permute(2, 0, 1, 3), dtype, tactic)
    assert_normalised(x.view(1, 3, -1), slots.view(1, 3, 36, 2).permute(2, 0, 1, 3), tactic)


def written(stream: Tensor, sums: Tensor, dtype: torch.dtype, tactic: Tactic) -> Tensor:
    """The rows as a product leaves them, with their statistics in sums."""
    batch, rows, columns = stream.shape
    nothing, zeros = (torch.zeros(*shape, 16, dtype=dtype, device=DEVICE) for shape in ((batch, rows), (columns,)))
    x, run = torch.empty_like(stream, dtype=dtype), {"tactic": tactic, "workspace": workspace()}
    linear(nothing, Weight(zeros), x, residual=Residual(stream), stats=StatsOut(sums, centred=True), **run)
    return x


def assert_normalised(x: Tensor, sums: Tensor, tactic: Tactic) -> None:
    """The product of a layer norm's rows is as near to float64 as PyTorch's, but for their means."""
    columns, run = x.shape[-1], {"tactic": tactic, "workspace": workspace()}
    data = randn(OUTPUTS, columns, dtype=x.dtype, scale=columns**-0.5)
    norm = InputNorm(sums, EPS, "layer", data.float().sum(1))
    out, oracle = (torch.empty(*x.shape[:2], OUTPUTS, device=DEVICE) for _ in range(2))
    for op, target in ((linear, out), (fused_reference.linear, oracle)):
        op(x, Weight(data), target, norm=norm, **run)

    exact = F.layer_norm(x.double(), (columns,), eps=EPS) @ data.double().T
    plain = F.layer_norm(x, (columns,), eps=EPS) @ data.T
    ratio = x.double().mean(-1).abs() / (x.double().var(-1, correction=0) + EPS).sqrt()
    rounding = LOW_PRECISION_FACTOR * largest_error(plain, exact) + FLOAT32_ERROR * exact.abs().max()
    allowed = rounding + UNCENTRED_ERROR * ratio.max()
    for result in (out, oracle):
        error = largest_error(result, exact)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


BEYOND_FLOAT16 = {
    "products": (torch.float16, 1e4, 20.0, None),
    "scaled columns": (torch.float16, 1e4, 1.0, 20.0),
    "stream": (torch.float32, 1e6, 1.0, None),
    "stream, scaled columns": (torch.float32, 1e4, 1.0, 20.0),
    # Normalised with an eps that is smaller still: as they are, float16 holds no digits of them.
    "small stream": (torch.float32, 1e-7, 1.0, None),
}
"""What float16 could not hold without the norm -> the input's dtype; its magnitude, the weight's and the columns'."""
TINY_EPS = 1e-18


@pytest.mark.parametrize("tactic", [SPLIT, LIBRARY])
@pytest.mark.parametrize("kind", ["rms", "layer", "double_rms"])
@pytest.mark.parametrize("op", [linear, swiglu, qkv], ids=lambda op: op.__name__)
@pytest.mark.parametrize("case", BEYOND_FLOAT16)
def test_float16_holds_what_it_holds_normalised(case, op, kind, tactic):
    torch.manual_seed(0)
    x_dtype, magnitude, weight_scale, column_scale = BEYOND_FLOAT16[case]
    x = randn(2, 9, 200, dtype=x_dtype, scale=magnitude)
    data = randn(3 * 16, 200, dtype=torch.float16, scale=weight_scale * 200**-0.5)
    col_scale = None if column_scale is None else column_scale * (1 + 0.2 * randn(200))
    scaled = data.float() if col_scale is None else data.float() * col_scale
    ones = torch.ones(200, device=DEVICE) if kind == "double_rms" else None
    norm = InputNorm(statistics(x, ones, kind == "layer"), TINY_EPS, kind, scaled.sum(1) if kind == "layer" else None)

    def run(op, dtype):
        options = {"col_scale": col_scale, "norm": norm, "tactic": tactic, "workspace": workspace()}
        if op.__name__ == "qkv":
            still = {"cos": torch.ones(2, 9, 8, device=DEVICE), "sin": torch.zeros(2, 9, 8, device=DEVICE)}
            parts = [torch.empty(2, 1, 9, 16, dtype=dtype, device=DEVICE) for _ in range(3)]
            op(x, Weight(data), *parts, **still, **options)
            return torch.cat(parts, dim=-1)[:, 0]
        out = torch.empty(2, 9, 24 if op.__name__ == "swiglu" else 48, dtype=dtype, device=DEVICE)
        op(x, Weight(data), out, **options)
        return out

    def released(dtype):
        """Normalised, rounded, multiplied, rounded."""
        wide = x.to(torch.promote_types(dtype, torch.float32))
        layer = kind == "layer"
        normed = F.layer_norm(wide, (200,), eps=TINY_EPS) if layer else F.rms_norm(wide, (200,), eps=TINY_EPS)
        normed = normed.to(dtype) if col_scale is None else normed.to(dtype) * col_scale.to(dtype)
        y = normed @ data.to(dtype).T
        return F.silu(y[..., :24]) * y[..., 24:] if op is swiglu else y

    exact, plain = released(torch.float64), released(torch.float16)
    assert plain.isfinite().all()
    oracle = getattr(fused_reference, op.__name__)
    for result in (run(op, torch.float16), run(oracle, torch.float32)):
        error, allowed = largest_error(result, exact), LOW_PRECISION_FACTOR * largest_error(plain, exact)
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
