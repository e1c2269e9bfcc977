"""What stands before and between the products: token embeddings, rotary tables, layer norm.

Each is one pass over its rows, a program a row or a few. Shape legend: B batch, M rows of each, C columns, D head_dim,
V vocabulary, I image tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import STATS_COLUMNS, StatsOut
from xr0_engine.kernels.device import gdc_begin, sin_cos
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import expect, strided

EMBED_SLOTS = 16
"""Slots of statistics, STATS_COLUMNS columns each, that one program of embed fills."""
ROPE_ROWS = 8
NORM_WARPS = 8


@triton.jit
def _embed(
    ids,
    ids_b,
    table,
    table_v,
    image_index,
    image_index_b,
    image_tokens,
    image_tokens_i,
    out,
    out_b,
    out_m,
    sums,
    sums_s,
    sums_b,
    sums_m,
    weight,
    rows,
    columns,
    SLOTS: tl.constexpr,
    SLOT_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, row = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    column = slot[:, None] * SLOT_COLUMNS + tl.arange(0, SLOT_COLUMNS)
    inside = column < columns
    gdc_begin(PDL)
    image = tl.load(image_index + batch * image_index_b + row).to(tl.int64)
    if image < 0:
        token = tl.load(ids + batch * ids_b + row).to(tl.int64)
        x = tl.load(table + token * table_v + column, inside, 0.0).to(tl.float32)
    else:
        x = tl.load(image_tokens + image * image_tokens_i + column, inside, 0.0).to(tl.float32)
    written = x.to(out.dtype.element_ty)
    tl.store(out + batch * out_b + row * out_m + column, written, inside)
    x = written.to(tl.float32)
    place = sums + slot * sums_s + batch * sums_b + row * sums_m
    tl.store(place, tl.sum(x * x, 1), slot * SLOT_COLUMNS < columns)
    if weight is not None:
        x *= tl.load(weight + column, inside, 0.0)
        tl.store(place + 1, tl.sum(x * x, 1), slot * SLOT_COLUMNS < columns)


def embed(ids: Tensor, table: Tensor, image_index: Tensor, image_tokens: Tensor, out: Tensor, stats: StatsOut) -> None:
    """Input rows of the language model: a row of table per id, or of image_tokens where image_index names one.

    ids, image_index: (B, M) int32, image_index -1 = none, where ids is read. table: (V, C); image_tokens: (I, C);
    out: (B, M, C). Raises ValueError for shapes that do not fit, NotImplementedError for centred stats.
    """
    if stats.centred:
        raise NotImplementedError("stats.centred: embed has none, which no layer norm follows; linear has them")
    (batch, rows), columns = ids.shape, table.shape[1]
    slots = triton.cdiv(columns, STATS_COLUMNS)
    expect("ids", ids, (batch, rows))
    expect("image_index", image_index, (batch, rows))
    expect("image_tokens", image_tokens, (image_tokens.shape[0], columns))
    expect("out", out, (batch, rows, columns))
    expect("stats.sums", stats.sums, (slots, batch, rows, 2))
    launch(
        _embed,
        (batch * rows, triton.cdiv(slots, EMBED_SLOTS)),
        {
            **strided("ids", ids, "b"),
            **strided("table", table, "v"),
            **strided("image_index", image_index, "b"),
            **strided("image_tokens", image_tokens, "i"),
            **strided("out", out, "bm"),
            **strided("sums", stats.sums, "sbm"),
            "weight": stats.weight,
            "rows": rows,
            "columns": columns,
            "SLOTS": EMBED_SLOTS,
            "SLOT_COLUMNS": STATS_COLUMNS,
        },
    )


@triton.jit
def store_rope(position, frequency, cos, sin, place, inside):
    """Rotary table entries at place: position is rounded to float32, then times frequency, as the model has it."""
    sine, cosine = sin_cos(position.to(tl.float32) * frequency)
    tl.store(cos + place, cosine, inside)
    tl.store(sin + place, sine, inside)


@triton.jit
def _rope_tables(
    positions,
    positions_a,
    positions_b,
    frequencies,
    axes,
    cos,
    cos_b,
    cos_m,
    sin,
    rows,
    half,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    batch = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, HALF)[None, :]
    frequency, axis = tl.load(frequencies + j, j < half, 0.0), tl.load(axes + j, j < half, 0)
    gdc_begin(PDL)
    inside = (row < rows) & (j < half)
    position = tl.load(positions + axis * positions_a + batch * positions_b + row, inside, 0)
    store_rope(position, frequency, cos, sin, batch * cos_b + row * cos_m + j, inside)


def rope_tables(positions: Tensor, frequencies: Tensor, axes: Tensor, cos: Tensor, sin: Tensor) -> None:
    """cos, sin of positions[axes[j], b, m] * frequencies[j].

    positions: (3, B, M) int32, M-RoPE; frequencies: (D / 2,) float32; axes: (D / 2,) int32, 0 to 2; cos, sin:
    (B, M, D / 2) float32 with the same strides. Raises ValueError for shapes that do not fit.
    """
    _, batch, rows = positions.shape
    expect("positions", positions, (3, batch, rows))
    expect_tables(batch, rows, frequencies, axes, cos, sin)
    half = frequencies.shape[0]
    launch(
        _rope_tables,
        (triton.cdiv(rows, ROPE_ROWS), batch),
        {
            **strided("positions", positions, "ab"),
            "frequencies": frequencies,
            "axes": axes,
            **strided("cos", cos, "bm"),
            "sin": sin,
            "rows": rows,
            "half": half,
            "ROWS": ROPE_ROWS,
            "HALF": triton.next_power_of_2(half),
        },
    )


def expect_tables(batch: int, rows: int, frequencies: Tensor, axes: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raises ValueError unless cos and sin can take rotary tables of rows tokens."""
    half = frequencies.shape[0]
    expect("axes", axes, (half,))
    expect("cos", cos, (batch, rows, half))
    expect("sin", sin, (batch, rows, half))
    if cos.stride() != sin.stride():
        raise ValueError(f"sin: expected the strides of cos, {cos.stride()}; got {sin.stride()}")


@triton.jit
def _layer_norm(
    x,
    x_b,
    x_m,
    weight,
    bias,
    eps,
    out,
    out_b,
    out_m,
    rows,
    columns,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    batch, row = (tl.program_id(0) // rows).to(tl.int64), (tl.program_id(0) % rows).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    scale = tl.load(weight + column, inside, 0.0).to(tl.float32)
    shift = tl.load(bias + column, inside, 0.0).to(tl.float32)
    gdc_begin(PDL)
    value = tl.load(x + batch * x_b + row * x_m + column, inside, 0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / columns, 0.0)
    variance = tl.sum(centred * centred, 0) / columns
    value = centred * tl.rsqrt(variance + eps) * scale + shift
    tl.store(out + batch * out_b + row * out_m + column, value.to(out.dtype.element_ty), inside)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None:
    """out = (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in float32.

    x, out: (B, M, C); weight, bias: (C,). Raises ValueError for shapes that do not fit.
    """
    batch, rows, columns = x.shape
    expect("x", x, (batch, rows, columns))
    expect("weight", weight, (columns,))
    expect("bias", bias, (columns,))
    expect("out", out, (batch, rows, columns))
    launch(
        _layer_norm,
        (batch * rows,),
        {
            **strided("x", x, "bm"),
            "weight": weight,
            "bias": bias,
            "eps": eps,
            **strided("out", out, "bm"),
            "rows": rows,
            "columns": columns,
            "COLUMNS": triton.next_power_of_2(columns),
        },
        warps=NORM_WARPS,
    )
