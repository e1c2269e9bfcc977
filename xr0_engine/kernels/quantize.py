"""Rows in 8 bits, each by a scale of its own: what comes before a product of 8-bit rows by an 8-bit weight.

A program has a whole row in registers, so that it is read once. Shape legend: B batch, M rows of each, K columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels import reference
from xr0_engine.kernels.arguments import InputNorm, slot_columns
from xr0_engine.kernels.device import gdc_begin, rows_of
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import expect, strided
from xr0_engine.kernels.statistics import row_norm

MOST_COLUMNS = 16384
"""Of a row that a program holds."""
COLUMNS_OF_WARP = 1024
"""A warp holds about so many: 32 registers of a thread."""
LEAST_LARGEST = tl.constexpr(reference.LEAST_LARGEST)
TO_INTEGER = tl.constexpr(1.5 * 2**23)
"""Float32 that have this added are rounded to integers, to nearest, ties to even, up to 2^22."""

LEAST_NORMAL = tl.constexpr(2.0**-6)
TO_LEAST = tl.constexpr(1.5 * 2**14)
"""Of e4m3: below LEAST_NORMAL its values are 2^-9 apart, as float32 at TO_LEAST are."""


@triton.jit
def to_float8(value):
    """Float32 rounded to what e4m3 has, to nearest, ties to even: compilers go by way of float16 on some chips, which
    rounds twice. Magnitudes of up to 448."""
    bits = value.to(tl.int32, bitcast=True)
    # Three bits behind the leading one are kept.
    near = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    small = (value + TO_LEAST) - TO_LEAST
    return tl.where(tl.abs(value) < LEAST_NORMAL, small, near)


@triton.jit
def _quantize(
    x,
    x_b,
    x_m,
    col_scale,
    bias,
    sums,
    sums_s,
    sums_b,
    sums_m,
    eps,
    out,
    out_b,
    out_m,
    scale,
    scale_b,
    rows,
    batch_rows,
    inputs,
    slots,
    MOST: tl.constexpr,
    NORM: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, row, _ = rows_of(tl.program_id(0), rows, batch_rows, 1)
    k = tl.arange(0, COLUMNS)[None, :]
    inside = k < inputs
    factor, shift = 0.0, 0.0
    if col_scale is not None:
        factor = tl.load(col_scale + k, inside, 0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + k, inside, 0.0).to(tl.float32)
    gdc_begin(PDL)
    value = tl.load(x + (batch * x_b + row * x_m)[:, None] + k, inside, 0.0).to(tl.float32)
    if NORM is not None:
        row_scale, mean = row_norm(sums, sums_s, batch * sums_b + row * sums_m, slots, inputs, eps, NORM, SLOTS)
        value = tl.where(inside, (value - mean[:, None]) * row_scale[:, None], 0.0)
    if col_scale is not None:
        value *= factor
    if bias is not None:
        value += shift
    # Without their sign float32 are in the order of their bits, and what is no number is the largest of all.
    bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    largest = tl.max(bits, 1).to(tl.float32, bitcast=True)
    largest = tl.where(largest < LEAST_LARGEST, LEAST_LARGEST, largest)
    most = tl.full((1,), MOST, tl.float32)
    value *= tl.div_rn(most, largest)[:, None]
    if out.dtype.element_ty == tl.int8:
        value = (value + TO_INTEGER) - TO_INTEGER
    if out.dtype.element_ty != tl.int8:
        value = to_float8(value)
    tl.store(out + (batch * out_b + row * out_m)[:, None] + k, value.to(out.dtype.element_ty), inside)
    tl.store(scale + batch * scale_b + row, tl.div_rn(largest, most))


def quantize(
    x: Tensor,
    out: Tensor,
    scale: Tensor,
    *,
    norm: InputNorm | None = None,
    col_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> None:
    """out * scale is about norm(x) * col_scale + bias, as reference.quantize_rows rounds it in float32.

    x: (B, M, K) floating point; out: (B, M, K) int8 or float8_e4m3fn; scale: (B, M) float32; col_scale, bias: (K,). Of
    a layer norm column_sums are not read. Raises ValueError for shapes and dtypes that do not fit, NotImplementedError
    for more than MOST_COLUMNS columns.
    """
    batch, rows, columns = x.shape
    expect("x", x, (batch, rows, columns))
    expect("out", out, (batch, rows, columns))
    expect("scale", scale, (batch, rows))
    for name, vector in (("col_scale", col_scale), ("bias", bias)):
        if vector is not None:
            expect(name, vector, (columns,))
    slots = 1
    if norm is not None:
        slots = norm.sums.shape[0]
        expect("norm.sums", norm.sums, (slots, batch, rows, 2))
        slot_columns("norm.sums", norm.sums, columns)
    if not x.is_floating_point() or x.element_size() == 1:
        raise ValueError(f"x: expected floating point of at least 16 bits, got {x.dtype}")
    if out.dtype not in reference.MOST:
        raise ValueError(f"out: expected int8 or float8_e4m3fn, got {out.dtype}")
    if columns > MOST_COLUMNS:
        raise NotImplementedError(f"quantize: at most {MOST_COLUMNS} columns, got {columns}")
    padded = triton.next_power_of_2(columns)
    launch(
        _quantize,
        (batch * rows,),
        {
            **strided("x", x, "bm"),
            "col_scale": col_scale,
            "bias": bias,
            **strided("sums", None if norm is None else norm.sums, "sbm"),
            "eps": 0.0 if norm is None else norm.eps,
            **strided("out", out, "bm"),
            **strided("scale", scale, "b"),
            "rows": batch * rows,
            "batch_rows": rows,
            "inputs": columns,
            "slots": slots,
            "MOST": reference.MOST[out.dtype],
            "NORM": None if norm is None else norm.kind,
            "SLOTS": triton.next_power_of_2(slots),
            "COLUMNS": padded,
        },
        warps=min(16, max(4, padded // COLUMNS_OF_WARP)),
    )
