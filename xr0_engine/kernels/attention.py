"""Attention without scores in memory: of the towers, and what lambda_attention.py shares with it.

A program holds one tile of queries and walks over blocks of keys, keeping per query the running maximum of its scores
(base 2), the sum of their exponentials, and the weighted sum of values. The query heads that share a KV head share a
tile: row r of a group's tile is query r // R of head r % R, R = H / G, so that keys and values are read once for all.

Shape legend: B batch, H query heads, G KV heads, M queries, N keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from xr0_engine.kernels.arguments import SHARED_LIMIT, Segments, Tactic, Workspace
from xr0_engine.kernels.device import gdc_begin
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import expect, expect_head_dim, expect_tiles, strided

LOG2_E = math.log2(math.e)


@triton.jit
def attend(q, keys, values, key_place, value_place, allowed, scale, total, weight, top, DIM: tl.constexpr):
    """Take one block of keys into the running (total, weight, top): sum of values, of exponentials, maximum.

    q: (rows, DIM). key_place, value_place: (block,) offsets, all of them of finite keys and values; those that are not
    allowed, (rows or 1, block), count for nothing.
    """
    column = tl.arange(0, DIM)
    k = tl.load(keys + key_place[None, :] + column[:, None])
    scores = tl.where(allowed, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = finite(new_top)
    exponentials = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    v = tl.load(values + value_place[:, None] + column[None, :])
    total = tl.dot(exponentials.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
    return total, weight * decay + tl.sum(exponentials, 1), new_top


@triton.jit
def finite(top):
    """A row that has seen nothing yet has no maximum: 0 in its place keeps its exponentials at 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def nothing_yet(ROWS: tl.constexpr, DIM: tl.constexpr):
    """(total, weight, top) before the first key."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    return tl.zeros((ROWS, DIM), tl.float32), tl.zeros((ROWS,), tl.float32), top


@triton.jit
def _attention(
    q,
    q_b,
    q_h,
    q_m,
    k,
    k_b,
    k_g,
    k_n,
    v,
    v_b,
    v_g,
    v_n,
    out,
    out_b,
    out_m,
    bounds,
    rows,
    keys,
    scale,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    # The last tiles see the most keys: they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    if bounds is not None:
        first = tl.load(bounds + 2 * batch)
        rows = tl.load(bounds + 2 * batch + 1) - first
        keys, batch, first = rows, tl.cast(0, tl.int64), first.to(tl.int64)
        q, k, v, out = q + first * q_m, k + first * k_n, v + first * v_n, out + first * out_m
        # The grid has as many tiles of each segment as the longest has.
        if tile * BLOCK_M >= rows * SHARE:
            return
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # From the tile's first row on, 32 bits are enough.
    first_row, row, head = tile * BLOCK_M // SHARE, packed // SHARE, packed % SHARE
    near, inside = (row - first_row)[:, None], (row < rows)[:, None]
    column = tl.arange(0, DIM)[None, :]
    gdc_begin(PDL)
    q_place = q + batch * q_b + group.to(tl.int64) * SHARE * q_h + first_row.to(tl.int64) * q_m
    query = tl.load(q_place + near * q_m + head[:, None] * q_h + column, inside, 0.0)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile * BLOCK_M + BLOCK_M - 1) // SHARE + 1 + keys - rows)
    total, weight, top = nothing_yet(BLOCK_M, DIM)
    k_place, v_place = k + batch * k_b + group.to(tl.int64) * k_g, v + batch * v_b + group.to(tl.int64) * v_g
    for start in range(0, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        allowed = (key < keys)[None, :]
        if CAUSAL:
            allowed = allowed & (key[None, :] <= row[:, None] + keys - rows)
        key = tl.minimum(key, keys - 1)
        total, weight, top = attend(
            query, k_place, v_place, key * k_n, key * v_n, allowed, scale, total, weight, top, DIM
        )
    mixed = (total / weight[:, None]).to(out.dtype.element_ty)
    out_place = out + batch * out_b + group * SHARE * DIM + first_row.to(tl.int64) * out_m
    tl.store(out_place + near * out_m + head[:, None] * DIM + column, mixed, inside)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    causal: bool,
    segments: Segments | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """Softmax attention with scale 1/sqrt(D) and grouped KV. causal: query i sees keys up to i + N - M.

    q: (B, H, M, D); k, v: (B, G, N, D); out: (B, M, H * D). segments: of all M = N rows of B = 1; a row sees those of
    its own segment. Raises ValueError for shapes that do not fit, NotImplementedError for a tactic of flash-attn where
    that is not installed.
    """
    batch, heads, rows, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    expect("q", q, (batch, heads, rows, dim))
    expect("k", k, (batch, groups, keys, dim))
    expect("v", v, (batch, groups, keys, dim))
    expect("out", out, (batch, rows, heads * dim))
    expect_head_dim(dim)
    expect_groups(heads, groups)
    if causal and keys < rows:
        raise ValueError(f"k: expected at least as many keys as queries, {rows}, if causal; got {keys}")
    if segments is not None:
        expect_segments(segments, batch, rows, keys)
    if tactic.library:
        for part in [(q, k, v, out)] if segments is None else _batches(q, k, v, out, segments):
            _by_library(*part, causal, tactic.flash)
        return
    expect_tiles(tactic, "block_m", "block_n")
    share = heads // groups
    longest = rows if segments is None else segments.lengths[0]
    launch(
        _attention,
        (triton.cdiv(longest * share, tactic.block_m), groups, batch if segments is None else len(segments.spans)),
        {
            **strided("q", q, "bhm"),
            **strided("k", k, "bgn"),
            **strided("v", v, "bgn"),
            **strided("out", out, "bm"),
            "bounds": None if segments is None else segments.bounds,
            "rows": rows,
            "keys": keys,
            "scale": dim**-0.5 * LOG2_E,
            "SHARE": share,
            "DIM": dim,
            "CAUSAL": causal,
            "BLOCK_M": tactic.block_m,
            "BLOCK_N": tactic.block_n,
        },
        tactic.warps,
        tactic.stages,
    )


def _batches(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, segments: Segments
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Views of the segments as batches of their own: one where all are of one length, else one for each."""
    if len(set(segments.lengths)) == 1:
        images = (len(segments.spans), segments.lengths[0])
        heads = (each[0].unflatten(1, images).transpose(0, 1) for each in (q, k, v))
        yield (*heads, out[0].unflatten(0, images))
        return
    for first, end in segments.spans:
        yield q[:, :, first:end], k[:, :, first:end], v[:, :, first:end], out[:, first:end]


def _by_library(q: Tensor, k: Tensor, v: Tensor, out: Tensor, causal: bool, flash: bool) -> None:
    mixed = _flash(q, k, v, causal) if flash else _torch_attention(q, k, v, causal)
    out.unflatten(-1, (q.shape[1], q.shape[3])).copy_(mixed)


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, M, H, D), by torch."""
    mask = causal_lower_right(q.shape[2], k.shape[2]) if causal else None
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The same by flash-attn, whose causal mask is ours: the last query sees all keys (since its version 2.1)."""
    if find_spec("flash_attn") is None:
        raise NotImplementedError("tactic.flash: flash-attn is not installed; a tactic without it runs")
    flash = import_module("flash_attn")
    return flash.flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)


def expect_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"q: expected a multiple of {groups} KV heads, got {heads} heads")


def expect_segments(segments: Segments, batch: int, rows: int, keys: int) -> None:
    """Raises ValueError unless they are of all rows of one sequence."""
    expect("segments.bounds", segments.bounds, (len(segments.spans), 2))
    if (batch, sum(segments.lengths), keys) != (1, rows, rows):
        raise ValueError(
            f"segments: expected those of all rows of one sequence, got {sum(segments.lengths)} rows for {batch} x "
            f"{rows} queries and {keys} keys"
        )


def attention_tactic(shape: tuple[int, ...], arch: int) -> Tactic:
    """How `attention` runs on a chip for which nothing was measured. shape: (B, H, M, G, N, D)."""
    roomy = SHARED_LIMIT[arch] >= 160 * 1024
    # Without the wide products of roomier chips, heads of 128 columns take more registers than four warps have.
    warps = 4 if roomy or shape[-1] < 128 else 8
    # Of 64 packed queries they spill on sm_120 (ptxas of Triton 3.7.1), which has room for twice the programs.
    rows = 32 if arch >= 120 and warps == 8 else 64
    return Tactic(block_m=rows, block_n=64, warps=warps, stages=3 if roomy else 2)
