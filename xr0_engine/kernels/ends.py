"""What follows the product of a linear layer, of a gated one and of heads, whichever schedule the product has.

What an epilogue reads that depends on no product, or on no other kernel, has a function of its own, for schedules that
load it ahead. HOW: product.py has it. Shape legend: B batch, M rows of each, N or F columns out, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.device import gelu_tanh
from xr0_engine.kernels.statistics import add_slots, store_stats


class LinearEnd(NamedTuple):
    """What a linear layer's epilogue reads and writes, as one argument: as linear, Residual and StatsOut have it."""

    outputs: int
    out: Tensor
    out_b: int
    out_m: int
    residual: Tensor | None
    residual_b: int
    residual_m: int
    gate: Tensor | None
    base_sums: Tensor | None
    base_sums_s: int
    base_sums_b: int
    base_sums_m: int
    base_weight: Tensor | None
    base_eps: float
    extra: Tensor | None
    extra_r: int
    extra_index: Tensor | None
    extra_index_b: int
    stats: Tensor | None
    stats_s: int
    stats_b: int
    stats_m: int
    stats_weight: Tensor | None


@triton.jit
def finish_linear(
    y, tile, end, CENTRED: tl.constexpr, ACTIVATION: tl.constexpr, OUT_SLOTS: tl.constexpr, HOW: tl.constexpr
):
    """Activation, residual, output and its statistics of a tile's y, (BLOCK_M, BLOCK_N) float32.

    OUT_SLOTS: (slots of the residual's sums, columns of a slot of the statistics).
    """
    vectors = load_vectors(tile, end, HOW)
    base = load_base(tile, end, vectors, OUT_SLOTS, HOW)
    write_linear(y, base, vectors, tile, end, CENTRED, ACTIVATION, OUT_SLOTS, HOW)


@triton.jit
def load_vectors(tile, end, HOW: tl.constexpr):
    """(gate, weight of the residual's norm, of the statistics) of a tile's columns, which depend on no other kernel."""
    column = tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)
    inside = column < end.outputs
    # Of what is not there some number: Triton 3.6 returns no None.
    gate, base_weight, stats_weight = 0.0, 0.0, 0.0
    if end.gate is not None:
        gate = tl.load(end.gate + column, inside, 0.0)
    if end.base_weight is not None:
        base_weight = tl.load(end.base_weight + column, inside, 0.0)
    if end.stats_weight is not None:
        stats_weight = tl.load(end.stats_weight + column, inside, 0.0)
    return gate, base_weight, stats_weight


@triton.jit
def load_base(tile, end, vectors, OUT_SLOTS: tl.constexpr, HOW: tl.constexpr):
    """What a tile's y is added to, (BLOCK_M, BLOCK_N) float32, if there is a residual. vectors: of load_vectors."""
    base = 0.0
    if end.residual is not None:
        batch, row = tile.batch, tile.row
        column = tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)
        mask = tile.inside[:, None] & (column < end.outputs)[None, :]
        base_place = end.residual + (batch * end.residual_b + row * end.residual_m)[:, None] + column[None, :]
        base = tl.load(base_place, mask, 0.0).to(tl.float32)
        if end.base_sums is not None:
            sums_place = batch * end.base_sums_b + row * end.base_sums_m
            SLOTS: tl.constexpr = triton.next_power_of_2(OUT_SLOTS[0])
            squares = add_slots(end.base_sums, end.base_sums_s, sums_place, OUT_SLOTS[0], SLOTS)
            base *= tl.rsqrt(squares / end.outputs + end.base_eps)[:, None]
            base *= vectors[1][None, :]
    return base


@triton.jit
def write_linear(
    y,
    base,
    vectors,
    tile,
    end,
    CENTRED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_SLOTS: tl.constexpr,
    HOW: tl.constexpr,
):
    """finish_linear, of what load_vectors and load_base have loaded."""
    batch, row, outputs = tile.batch, tile.row, end.outputs
    column = tile.column_tile * HOW.BLOCK_N + tl.arange(0, HOW.BLOCK_N)
    mask = tile.inside[:, None] & (column < outputs)[None, :]
    if ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        y = gelu_tanh(y)
    if end.residual is not None:
        if end.gate is not None:
            y *= vectors[0][None, :]
        y += base
        if end.extra is not None:
            index = tl.load(end.extra_index + batch * end.extra_index_b + row)
            extra_mask = mask & (index >= 0)[:, None]
            extra_place = (index.to(tl.int64) * end.extra_r)[:, None] + column[None, :]
            y += tl.load(end.extra + extra_place, extra_mask, 0.0).to(tl.float32)
    written = y.to(end.out.dtype.element_ty)
    tl.store(end.out + (batch * end.out_b + row * end.out_m)[:, None] + column[None, :], written, mask)
    if end.stats is not None:
        place = end.stats + batch * end.stats_b + row * end.stats_m
        WEIGHTED: tl.constexpr = end.stats_weight is not None
        store_stats(
            written, outputs, tile.column_tile, column, place, end.stats_s, tile.inside, vectors[2], CENTRED, WEIGHTED,
            OUT_SLOTS[1], HOW,
        )  # fmt: skip


class SwigluEnd(NamedTuple):
    """Where a gated layer's epilogue writes, as one argument. outputs: columns of out."""

    outputs: int
    out: Tensor
    out_b: int
    out_m: int


@triton.jit
def finish_swiglu(y, tile, end, HOW: tl.constexpr):
    """Gate and output of a tile's y, (BLOCK_M, BLOCK_N) float32, whose columns are pairs of gate and up."""
    gate, up = tl.split(tl.reshape(y, (HOW.BLOCK_M, HOW.BLOCK_N // 2, 2)))
    column = tile.column_tile * (HOW.BLOCK_N // 2) + tl.arange(0, HOW.BLOCK_N // 2)
    target = end.out + (tile.batch * end.out_b + tile.row * end.out_m)[:, None] + column[None, :]
    value = gate * tl.sigmoid(gate) * up
    tl.store(target, value.to(end.out.dtype.element_ty), tile.inside[:, None] & (column < end.outputs)[None, :])


@triton.jit
def _store_head(first, second, out, place, mask, HALF: tl.constexpr):
    target = out + place[:, None] + tl.arange(0, HALF)[None, :]
    tl.store(target, first.to(out.dtype.element_ty), mask)
    tl.store(target + HALF, second.to(out.dtype.element_ty), mask)


@triton.jit
def _store_rotated(first, second, norm_weight, eps, cos, sin, angles, out, place, mask, HALF: tl.constexpr):
    """Head norm and rotation of the halves of one head's rows; cos, sin at angles, out at place."""
    d = tl.arange(0, HALF)
    if norm_weight is not None:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        row_scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        first *= row_scale * tl.load(norm_weight + d).to(tl.float32)[None, :]
        second *= row_scale * tl.load(norm_weight + HALF + d).to(tl.float32)[None, :]
    c = tl.load(cos + angles[0][:, None] + d[None, :])
    s = tl.load(sin + angles[1][:, None] + d[None, :])
    _store_head(first * c - second * s, second * c + first * s, out, place, mask, HALF)


class HeadsEnd(NamedTuple):
    """What the epilogue of queries, keys and values reads and writes, as one argument: as qkv has it."""

    query_heads: int
    kv_heads: int
    q: Tensor | None
    q_b: int
    q_h: int
    q_m: int
    k: Tensor
    k_b: int
    k_h: int
    k_m: int
    v: Tensor
    v_b: int
    v_h: int
    v_m: int
    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    cos: Tensor
    cos_b: int
    cos_m: int
    sin: Tensor
    sin_b: int
    sin_m: int


@triton.jit
def finish_qkv(y, tile, end, HOW: tl.constexpr):
    """Head norm, rotation and output of a tile's y, (BLOCK_M, BLOCK_N) float32: one head, its columns in pairs."""
    HALF: tl.constexpr = HOW.BLOCK_N // 2
    batch, row, head = tile.batch, tile.row, tl.cast(tile.column_tile, tl.int64)
    first, second = tl.split(tl.reshape(y, (HOW.BLOCK_M, HALF, 2)))
    mask = tile.inside[:, None]
    cos, sin, angles = end.cos, end.sin, (batch * end.cos_b + row * end.cos_m, batch * end.sin_b + row * end.sin_m)
    if head >= end.query_heads + end.kv_heads:
        place = batch * end.v_b + (head - end.query_heads - end.kv_heads) * end.v_h + row * end.v_m
        _store_head(first, second, end.v, place, mask, HALF)
    elif head >= end.query_heads:
        place = batch * end.k_b + (head - end.query_heads) * end.k_h + row * end.k_m
        _store_rotated(first, second, end.k_weight, end.eps, cos, sin, angles, end.k, place, mask, HALF)
    elif end.q is not None:
        place = batch * end.q_b + head * end.q_h + row * end.q_m
        _store_rotated(first, second, end.q_weight, end.eps, cos, sin, angles, end.q, place, mask, HALF)
