"""The action head's attention, whose few queries see cached keys and their own under the Lambda-shaped mask.

Of SPLITS programs all but the last share out the cached keys, in equal runs of blocks of the valid range, which lives
on the device; the last takes the own keys, and all there are where it is alone. Each leaves total, weight and top
(attention.py) in float32; the last to arrive combines them in the order of the splits, whoever it is, PARTS_AT_ONCE of
them in one trip: replays are bit-identical. With the schedule "whole" (whole_attention.py) nothing is split.

Shape legend: B batch, H query heads, G KV heads, Q queries, N cached keys, D head_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import Heads, Tactic, Workspace
from xr0_engine.kernels.attention import LOG2_E, attend, expect_groups, finite, nothing_yet
from xr0_engine.kernels.device import gdc_begin, prefetch_l2, with_last
from xr0_engine.kernels.launch import PROCESSORS, launch
from xr0_engine.kernels.shapes import expect, expect_head_dim, expect_tiles, strided
from xr0_engine.kernels.whole_attention import launch_whole_attention

OWN_BLOCK = 32
"""Own keys that lambda_attention takes at a time."""
PARTS_AT_ONCE = tl.constexpr(8)
"""Splits that a program combines at a time: as many as it has registers for."""
WHOLE_KEYS, WHOLE_STEP, HEAD_COLUMNS = 384, 256, 128
"""Up to so many cached keys need no split, and so many are one step, for heads of at most so many columns."""


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
    CACHED_SPLITS: tl.constexpr = max(SPLITS - 1, 1)
    tile_index, split = program // SPLITS, program % SPLITS
    tile, group = tile_index % tiles, tl.cast(tile_index // tiles % groups, tl.int64)
    batch = tl.cast(tile_index // tiles // groups, tl.int64)
    keys = kv_keys + batch * kv_keys_b + group * kv_keys_g
    values = kv_values + batch * kv_values_b + group * kv_values_g
    if PDL:
        # Which of them are valid may not be known yet; together the splits ask for all.
        most = tl.cdiv(tl.cdiv(cached, BLOCK_N), CACHED_SPLITS) * BLOCK_N
        last = tl.minimum(cached, (split + 1) * most)
        _prefetch(keys, values, kv_keys_n, kv_values_n, split * most, last, DIM, BLOCK_N)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // SHARE, group * SHARE + packed % SHARE
    inside = (row < queries)[:, None]
    column = tl.arange(0, DIM)[None, :]
    gdc_begin(PDL)

    query = tl.load(q + batch * q_b + head[:, None] * q_h + row[:, None] * q_m + column, inside, 0.0)
    total, weight, top = nothing_yet(BLOCK_M, DIM)
    first_valid, end_valid = tl.maximum(tl.load(begin + batch), 0), tl.minimum(tl.load(end + batch), cached)
    run = tl.cdiv(tl.cdiv(end_valid - first_valid, BLOCK_N), CACHED_SPLITS) * BLOCK_N
    first = first_valid + split * run
    for start in range(first, tl.minimum(end_valid, first + run), BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        allowed = (key < end_valid)[None, :]
        key = tl.minimum(key, end_valid - 1)
        total, weight, top = attend(
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
            total, weight, top = attend(
                query, k_place, v_place, k_offset, v_offset, allowed, scale, total, weight, top, DIM
            )

    place = out + batch * out_b + row[:, None] * out_m + head[:, None] * DIM + column
    if SPLITS == 1:
        tl.store(place, (total / weight[:, None]).to(out.dtype.element_ty), inside)
    else:
        totals = partials + tl.cast(tile_index, tl.int64) * (SPLITS * BLOCK_M * (DIM + 2))
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
            total, weight, top = nothing_yet(BLOCK_M, DIM)
            for first_part in tl.static_range(0, SPLITS, PARTS_AT_ONCE):
                parts = ()
                for part in tl.static_range(first_part, min(first_part + PARTS_AT_ONCE, SPLITS)):
                    part_top = tl.load(tops + part * BLOCK_M + line, cache_modifier=".cg")
                    part_weight = tl.load(weights + part * BLOCK_M + line, cache_modifier=".cg")
                    part_total = tl.load(totals + part * BLOCK_M * DIM + element, cache_modifier=".cg")
                    parts = with_last(parts, (part_top, part_weight, part_total))
                for index in tl.static_range(len(parts)):
                    part_top, part_weight, part_total = parts[index]
                    new_top = tl.maximum(top, part_top)
                    base = finite(new_top)
                    decay, grow = tl.exp2(top - base), tl.exp2(part_top - base)
                    total = total * decay[:, None] + part_total * grow[:, None]
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
    heads: Heads | None = None,
    tactic: Tactic,
    workspace: Workspace,
) -> None:
    """DiT attention over [cached KV block ; own keys] under the Lambda-shaped mask (spec section 2.4).

    Own key j is seen by query i if j <= i and (j < context or window is None or i - j <= window); cached key n by all
    if begin <= n < end, which may be an empty range.
    q, k, v: (B, H, Q, D), after norms and RoPE, or with heads before them, in float32, as no schedule but "whole" takes
    them; kv_keys, kv_values: (B, G, N, D); begin, end: (B,) int32; out: (B, Q, H * D); context: sink and state tokens.
    Raises ValueError for shapes that do not fit, NotImplementedError for heads with another schedule.
    """
    batch, query_heads, queries, dim = q.shape
    groups, cached = kv_keys.shape[1], kv_keys.shape[2]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect(name, tensor, (batch, query_heads, queries, dim))
    for name, tensor in (("kv_keys", kv_keys), ("kv_values", kv_values)):
        expect(name, tensor, (batch, groups, cached, dim))
    for name, tensor in (("begin", begin), ("end", end)):
        expect(name, tensor, (batch,))
    expect("out", out, (batch, queries, query_heads * dim))
    expect_head_dim(dim)
    expect_groups(query_heads, groups)
    if tactic.library:
        raise NotImplementedError("library: has no lambda_attention; a tactic without library has")
    expect_tiles(tactic, "block_m", "block_n")
    if heads is not None:
        for name, vector in (("heads.q_weight", heads.q_weight), ("heads.k_weight", heads.k_weight)):
            expect(name, vector, (dim,))
        for name, table in (("heads.cos", heads.cos), ("heads.sin", heads.sin)):
            expect(name, table, (batch, queries, dim // 2))
    if tactic.schedule == "whole":
        arguments = (q, k, v, kv_keys, kv_values, begin, end, out, window, context, heads, tactic, OWN_BLOCK)
        launch_whole_attention(*arguments)
        return
    if tactic.schedule != "tiled":
        raise NotImplementedError(f"tactic.schedule: expected 'tiled' or 'whole', got {tactic.schedule!r}")
    if heads is not None:
        raise NotImplementedError("schedule 'tiled': takes queries and keys after norms and RoPE; 'whole' does both")
    share, splits = query_heads // groups, tactic.split_k
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


def lambda_tactic(shape: tuple[int, ...], arch: int) -> Tactic:
    """How it runs on a chip for which nothing was measured. shape: (B, H, Q, G, N, D).

    Up to WHOLE_KEYS cached keys every program has all of them, beyond there is a split per processor.
    """
    cached, dim = shape[4:]
    if cached <= WHOLE_KEYS and dim <= HEAD_COLUMNS:
        # Of the keys of a step, whose values are loaded with them, as many as registers hold.
        block_n = 32 if cached <= WHOLE_STEP else 16
        return Tactic(block_m=16, block_n=block_n, warps=8, stages=2, schedule="whole")
    return split_lambda_tactic(shape, arch)


def split_lambda_tactic(shape: tuple[int, ...], arch: int) -> Tactic:
    """Tiled, with a program per processor. shape: as lambda_tactic."""
    batch, heads, queries, groups, cached, _ = shape
    block_m = min(64, max(16, triton.next_power_of_2(queries * heads // groups)))
    programs = batch * groups * triton.cdiv(queries * heads // groups, block_m)
    splits = min(triton.cdiv(cached, 32) + 1, max(1, PROCESSORS[arch] // programs))
    return Tactic(block_m=block_m, block_n=32, split_k=splits, warps=4, stages=2)
