"""Attention without scores in memory: of the towers (attention), and of the action head (lambda_attention).

A program holds one tile of queries and walks over blocks of keys, keeping per query the running maximum of its scores
(base 2), the sum of their exponentials, and the weighted sum of values. The query heads that share a KV head share a
tile: row r of a group's tile is query r // R of head r % R, R = H / G, so that keys and values are read once for all.

lambda_attention has few queries, so the cached keys are shared out among SPLITS programs, in equal runs of blocks of
the valid range, which lives on the device. The last of them takes the own keys too. Each leaves its three quantities
in float32; the last to arrive combines them in the order of the splits, whoever it is: replays are bit-identical.

Shape legend: B batch, H query heads, G KV heads, M or Q queries, N keys, D head_dim.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from xr0_engine.kernels.arguments import SHARED_LIMIT, Tactic, Workspace
from xr0_engine.kernels.device import gdc_begin, prefetch_l2
from xr0_engine.kernels.launch import PROCESSORS, launch
from xr0_engine.kernels.shapes import expect, expect_head_dim, expect_tiles, strided

LOG2_E = math.log2(math.e)
OWN_BLOCK = 32
"""Own keys that lambda_attention takes at a time."""


@triton.jit
def _attend(q, keys, values, key_place, value_place, allowed, scale, total, weight, top, DIM: tl.constexpr):
    """Take one block of keys into the running (total, weight, top): sum of values, of exponentials, maximum.

    q: (rows, DIM). key_place, value_place: (block,) offsets, all of them of finite keys and values; those that are not
    allowed, (rows or 1, block), count for nothing.
    """
    column = tl.arange(0, DIM)
    k = tl.load(keys + key_place[None, :] + column[:, None])
    scores = tl.where(allowed, tl.dot(q, k, input_precision="ieee") * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = _finite(new_top)
    exponentials = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    v = tl.load(values + value_place[:, None] + column[None, :])
    total = tl.dot(exponentials.to(v.dtype), v, total * decay[:, None], input_precision="ieee")
    return total, weight * decay + tl.sum(exponentials, 1), new_top


@triton.jit
def _finite(top):
    """A row that has seen nothing yet has no maximum: 0 in its place keeps its exponentials at 0."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _nothing_yet(ROWS: tl.constexpr, DIM: tl.constexpr):
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
    group, batch = tl.program_id(1), tl.program_id(2)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // SHARE, group * SHARE + packed % SHARE
    inside = (row < rows)[:, None]
    column = tl.arange(0, DIM)[None, :]
    gdc_begin(PDL)
    query = tl.load(q + batch * q_b + head[:, None] * q_h + row[:, None] * q_m + column, inside, 0.0)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, (tile * BLOCK_M + BLOCK_M - 1) // SHARE + 1 + keys - rows)
    total, weight, top = _nothing_yet(BLOCK_M, DIM)
    k_place, v_place = k + batch * k_b + group * k_g, v + batch * v_b + group * v_g
    for start in range(0, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        allowed = (key < keys)[None, :]
        if CAUSAL:
            allowed = allowed & (key[None, :] <= row[:, None] + keys - rows)
        key = tl.minimum(key, keys - 1)
        total, weight, top = _attend(
            query, k_place, v_place, key * k_n, key * v_n, allowed, scale, total, weight, top, DIM
        )
    mixed = (total / weight[:, None]).to(out.dtype.element_ty)
    tl.store(out + batch * out_b + row[:, None] * out_m + head[:, None] * DIM + column, mixed, inside)


def attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *, causal: bool, tactic: Tactic, workspace: Workspace
) -> None:
    """Softmax attention with scale 1/sqrt(D) and grouped KV. causal: query i sees keys up to i + N - M.

    q: (B, H, M, D); k, v: (B, G, N, D); out: (B, M, H * D). Raises ValueError for shapes that do not fit,
    NotImplementedError for a tactic of flash-attn where that is not installed.
    """
    batch, heads, rows, dim = q.shape
    groups, keys = k.shape[1], k.shape[2]
    expect("q", q, (batch, heads, rows, dim))
    expect("k", k, (batch, groups, keys, dim))
    expect("v", v, (batch, groups, keys, dim))
    expect("out", out, (batch, rows, heads * dim))
    expect_head_dim(dim)
    _expect_groups(heads, groups)
    if causal and keys < rows:
        raise ValueError(f"k: expected at least as many keys as queries, {rows}, if causal; got {keys}")
    if tactic.library:
        mixed = _flash(q, k, v, causal) if tactic.flash else _torch_attention(q, k, v, causal)
        out.unflatten(-1, (heads, dim)).copy_(mixed)
        return
    expect_tiles(tactic, "block_m", "block_n")
    share = heads // groups
    launch(
        _attention,
        (triton.cdiv(rows * share, tactic.block_m), groups, batch),
        {
            **strided("q", q, "bhm"),
            **strided("k", k, "bgn"),
            **strided("v", v, "bgn"),
            **strided("out", out, "bm"),
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


@triton.jit
def _prefetch(keys, values, key_stride, value_stride, first, end, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Ask for keys and values first to end - 1."""
    LINE: tl.constexpr = 1024 // keys.dtype.element_ty.primitive_bitwidth
    column = tl.arange(0, triton.cdiv(DIM, LINE))[None, :] * LINE
    for start in range(first, end, BLOCK):
        key = tl.minimum(start + tl.arange(0, BLOCK), end - 1)[:, None]
        prefetch_l2(keys + key * key_stride + column)
        prefetch_l2(values + key * value_stride + column)


@triton.jit
def _lambda_attention(
    program,
    q,
    q_b,
    q_h,
    q_m,
    k,
    k_b,
    k_h,
    k_m,
    v,
    v_b,
    v_h,
    v_m,
    kv_keys,
    kv_keys_b,
    kv_keys_g,
    kv_keys_n,
    kv_values,
    kv_values_b,
    kv_values_g,
    kv_values_n,
    begin,
    end,
    out,
    out_b,
    out_m,
    partials,
    counters,
    tiles,
    groups,
    queries,
    cached,
    window,
    context,
    scale,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OWN: tl.constexpr,
    PDL: tl.constexpr,
):
    if program is None:
        program = tl.program_id(0)
    tile_index, split = program // SPLITS, program % SPLITS
    tile, group, batch = tile_index % tiles, tile_index // tiles % groups, tile_index // tiles // groups
    keys = kv_keys + batch * kv_keys_b + group * kv_keys_g
    values = kv_values + batch * kv_values_b + group * kv_values_g
    if PDL:
        # Which of them are valid may not be known yet; together the splits ask for all.
        most = tl.cdiv(tl.cdiv(cached, BLOCK_N), SPLITS) * BLOCK_N
        last = tl.minimum(cached, (split + 1) * most)
        _prefetch(keys, values, kv_keys_n, kv_values_n, split * most, last, DIM, BLOCK_N)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // SHARE, group * SHARE + packed % SHARE
    inside = (row < queries)[:, None]
    column = tl.arange(0, DIM)[None, :]
    gdc_begin(PDL)

    query = tl.load(q + batch * q_b + head[:, None] * q_h + row[:, None] * q_m + column, inside, 0.0)
    total, weight, top = _nothing_yet(BLOCK_M, DIM)
    first_valid, end_valid = tl.maximum(tl.load(begin + batch), 0), tl.minimum(tl.load(end + batch), cached)
    run = tl.cdiv(tl.cdiv(end_valid - first_valid, BLOCK_N), SPLITS) * BLOCK_N
    first = first_valid + split * run
    for start in range(first, tl.minimum(end_valid, first + run), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        allowed = (key < end_valid)[None, :]
        key = tl.minimum(key, end_valid - 1)
        total, weight, top = _attend(
            query, keys, values, key * kv_keys_n, key * kv_values_n, allowed, scale, total, weight, top, DIM
        )

    if split == SPLITS - 1:
        k_place, v_place = k + batch * k_b + group * SHARE * k_h, v + batch * v_b + group * SHARE * v_h
        # Own keys have a head each: those of all the tile's heads are walked over, and each row takes its own head's.
        for start in range(0, tl.minimum(queries * SHARE, (tile + 1) * BLOCK_M), OWN):
            own = start + tl.arange(0, OWN)
            token, own_head = own // SHARE, own % SHARE
            distance = row[:, None] - token[None, :]
            near = (token[None, :] < context) | (distance <= window)
            same_head = (packed % SHARE)[:, None] == own_head[None, :]
            allowed = (token < queries)[None, :] & same_head & (distance >= 0) & near
            token = tl.minimum(token, queries - 1)
            k_offset, v_offset = own_head * k_h + token * k_m, own_head * v_h + token * v_m
            total, weight, top = _attend(
                query, k_place, v_place, k_offset, v_offset, allowed, scale, total, weight, top, DIM
            )

    place = out + batch * out_b + row[:, None] * out_m + head[:, None] * DIM + column
    if SPLITS == 1:
        tl.store(place, (total / weight[:, None]).to(out.dtype.element_ty), inside)
    else:
        totals = partials + tile_index * (SPLITS * BLOCK_M * (DIM + 2))
        weights = totals + SPLITS * BLOCK_M * DIM
        tops = weights + SPLITS * BLOCK_M
        line = tl.arange(0, BLOCK_M)
        element = line[:, None] * DIM + column
        tl.store(totals + split * BLOCK_M * DIM + element, total)
        tl.store(weights + split * BLOCK_M + line, weight)
        tl.store(tops + split * BLOCK_M + line, top)
        # All threads' stores come before the one thread's arrival.
        tl.debug_barrier()
        if tl.atomic_add(counters + tile_index, 1, sem="acq_rel") == SPLITS - 1:
            total, weight, top = _nothing_yet(BLOCK_M, DIM)
            for part in range(SPLITS):
                part_top = tl.load(tops + part * BLOCK_M + line, cache_modifier=".cg")
                new_top = tl.maximum(top, part_top)
                base = _finite(new_top)
                decay, grow = tl.exp2(top - base), tl.exp2(part_top - base)
                part_total = tl.load(totals + part * BLOCK_M * DIM + element, cache_modifier=".cg")
                total = total * decay[:, None] + part_total * grow[:, None]
                part_weight = tl.load(weights + part * BLOCK_M + line, cache_modifier=".cg")
                weight, top = weight * decay + part_weight * grow, new_top
            tl.store(place, (total / weight[:, None]).to(out.dtype.element_ty), inside)
            tl.store(counters + tile_index, 0)


def lambda_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_keys: Tensor,
    kv_values: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    *,
    window: int | None,
    context: int,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """DiT attention over [cached KV block ; own keys] under the Lambda-shaped mask (spec section 2.4).

    Own key j is seen by query i if j <= i and (j < context or window is None or i - j <= window); cached key n by all
    if begin <= n < end, which may be an empty range.
    q, k, v: (B, H, Q, D), after norms and RoPE; kv_keys, kv_values: (B, G, N, D); begin, end: (B,) int32;
    out: (B, Q, H * D); context: sink and state tokens. Raises ValueError for shapes that do not fit.
    """
    batch, heads, queries, dim = q.shape
    groups, cached = kv_keys.shape[1], kv_keys.shape[2]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(name, tensor, (batch, heads, queries, dim))
    for name, tensor in (("kv_keys", kv_keys), ("kv_values", kv_values)):
        expect(name, tensor, (batch, groups, cached, dim))
    for name, tensor in (("begin", begin), ("end", end)):
        expect(name, tensor, (batch,))
    expect("out", out, (batch, queries, heads * dim))
    expect_head_dim(dim)
    _expect_groups(heads, groups)
    if tactic.library:
        raise NotImplementedError("library: has no lambda_attention; a tactic without library has")
    expect_tiles(tactic, "block_m", "block_n")
    share, splits = heads // groups, tactic.split_k
    tiles = triton.cdiv(queries * share, tactic.block_m)
    elements = 0 if splits == 1 else batch * groups * tiles * splits * tactic.block_m * (dim + 2)
    launch(
        _lambda_attention,
        (tiles * splits * groups * batch,),
        {
            "program": None,
            **strided("q", q, "bhm"),
            **strided("k", k, "bhm"),
            **strided("v", v, "bhm"),
            **strided("kv_keys", kv_keys, "bgn"),
            **strided("kv_values", kv_values, "bgn"),
            "begin": begin,
            "end": end,
            **strided("out", out, "bm"),
            "partials": workspace.partials(elements),
            "counters": workspace.counters(batch * groups * tiles),
            "tiles": tiles,
            "groups": groups,
            "queries": queries,
            "cached": cached,
            "window": queries if window is None else window,
            "context": context,
            "scale": dim**-0.5 * LOG2_E,
            "SHARE": share,
            "DIM": dim,
            "SPLITS": splits,
            "BLOCK_M": tactic.block_m,
            "BLOCK_N": tactic.block_n,
            "OWN": OWN_BLOCK,
        },
        tactic.warps,
        tactic.stages,
    )


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


def _expect_groups(heads: int, groups: int) -> None:
    if heads % groups:
        raise ValueError(f"q: expected a multiple of {groups} KV heads, got {heads} heads")


def attention_tactic(shape: tuple[int, ...], arch: int) -> Tactic:
    """How `attention` runs on a chip for which nothing was measured. shape: (B, H, M, G, N, D)."""
    roomy = SHARED_LIMIT[arch] >= 160 * 1024
    # Without the wide products of roomier chips, heads of 128 columns take more registers than four warps have.
    warps = 4 if roomy or shape[-1] < 128 else 8
    return Tactic(block_m=64, block_n=64, warps=warps, stages=3 if roomy else 2)


def lambda_tactic(shape: tuple[int, ...], arch: int) -> Tactic:
    """The same of `lambda_attention`. shape: (B, H, Q, G, N, D). Splits are as small as the chip has processors."""
    batch, heads, queries, groups, cached, _ = shape
    block_m = min(64, max(16, triton.next_power_of_2(queries * heads // groups)))
    programs = batch * groups * triton.cdiv(queries * heads // groups, block_m)
    splits = min(triton.cdiv(cached, 32), max(1, PROCESSORS[arch] // programs))
    return Tactic(block_m=block_m, block_n=32, split_k=splits, warps=4, stages=2)
