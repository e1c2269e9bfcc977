"""The action head's attention with its keys shared out over a program's warps. The schedule "whole" (lambda_attention).

A program has a tile of queries and all keys of their KV head: nothing is combined through global memory. Each warp
keeps total, weight and top (attention.py) of its own share of every step of keys, as one of a batch of products; the
shares, and that of the own keys, are combined in shared memory in one fixed order.

The first step of cached keys and values is loaded before the wait for the kernel ahead, the rest is on its way to the
L2 cache. That is safe as long as the kernel directly ahead writes none of them, nor begin and end: it let this one
start after its own wait, when all before it had ended. Where the KV block comes from another stream, its event stands
ahead of this kernel or of an earlier one, and no kernel starts before an event that it waits for.

Queries and keys may come as their product left them (arguments.py: Heads): then the head norm and the rotation are
done here, in float32, before they are rounded as the product's own epilogue would have rounded them.

Shape legend: B batch, H query heads, G KV heads, Q queries, N cached keys, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from xr0_engine.kernels.arguments import Heads, Tactic
from xr0_engine.kernels.attention import LOG2_E, finite, nothing_yet
from xr0_engine.kernels.device import gdc_begin, prefetch_l2
from xr0_engine.kernels.launch import launch
from xr0_engine.kernels.shapes import strided


class Own(NamedTuple):
    """The queries and keys of the call's own tokens, as one argument. norms and tables: of Heads, or None."""

    q: Tensor
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
    cos: Tensor | None
    cos_b: int
    cos_m: int
    sin: Tensor | None
    sin_b: int
    sin_m: int


class Cached(NamedTuple):
    """The KV block, as one argument."""

    kv_keys: Tensor
    kv_keys_b: int
    kv_keys_g: int
    kv_keys_n: int
    kv_values: Tensor
    kv_values_b: int
    kv_values_g: int
    kv_values_n: int
    begin: Tensor
    end: Tensor
    length: int


@triton.jit
def _load_head(place, own, batch, token, DIM: tl.constexpr):
    """One head's rows at place, (rows,), of tokens: (rows, DIM) and, with tables, all that _turn makes them from."""
    HALF: tl.constexpr = DIM // 2
    column = tl.arange(0, DIM)
    x = tl.load(place[:, None] + column[None, :])
    y, c, s = x, x, x
    if own.cos is not None:
        # With every column comes the one that it is rotated with.
        y = tl.load(place[:, None] + ((column + HALF) % DIM)[None, :])
        c = tl.load(own.cos + batch * own.cos_b + (token * own.cos_m)[:, None] + (column % HALF)[None, :])
        s = tl.load(own.sin + batch * own.sin_b + (token * own.sin_m)[:, None] + (column % HALF)[None, :])
    return x, y, c, s


@triton.jit
def _turn(loaded, own, weight, dtype: tl.constexpr, DIM: tl.constexpr):
    """(rows, DIM) of dtype: what _load_head loaded, after the head norm and the rotation where it lacks them."""
    x, y, c, s = loaded
    if own.cos is not None:
        HALF: tl.constexpr = DIM // 2
        column = tl.arange(0, DIM)
        scale = tl.rsqrt(tl.sum(x * x, 1) / DIM + own.eps)[:, None]
        x *= scale * tl.load(weight + column).to(tl.float32)[None, :]
        y *= scale * tl.load(weight + (column + HALF) % DIM).to(tl.float32)[None, :]
        x = x * c + tl.where(column < HALF, -1.0, 1.0)[None, :] * y * s
    return x.to(dtype)


@triton.jit
def _load_own(own, batch, group, start, queries, SHARE: tl.constexpr, DIM: tl.constexpr, OWN: tl.constexpr):
    """Keys, as _load_head, and values of OWN own tokens' heads, from start on; the last again behind it."""
    key = start + tl.arange(0, OWN)
    token, head = tl.minimum(key // SHARE, queries - 1), group * SHARE + key % SHARE
    keys = _load_head(own.k + batch * own.k_b + head * own.k_h + token * own.k_m, own, batch, token, DIM)
    place = own.v + batch * own.v_b + head * own.v_h + token * own.v_m
    return keys, tl.load(place[:, None] + tl.arange(0, DIM)[None, :])


@triton.jit
def _attend_own(
    query,
    loaded,
    own,
    start,
    packed,
    queries,
    window,
    context,
    scale,
    state,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    OWN: tl.constexpr,
):
    """attend (attention.py), of what _load_own loaded. Own keys have a head each: a row takes its own head's."""
    dtype: tl.constexpr = query.dtype
    total, weight, top = state
    key, row = start + tl.arange(0, OWN), packed // SHARE
    token, distance = key // SHARE, row[:, None] - (key // SHARE)[None, :]
    seen = (token[None, :] < context) | (distance <= window)
    same_head = (packed % SHARE)[:, None] == (key % SHARE)[None, :]
    allowed = (token < queries)[None, :] & same_head & (distance >= 0) & seen
    k = _turn(loaded[0], own, own.k_weight, dtype, DIM)
    scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(allowed, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = finite(new_top)
    exponentials = tl.exp2(scores - base[:, None])
    decay = tl.exp2(top - base)
    total = tl.dot(exponentials.to(dtype), loaded[1].to(dtype), total * decay[:, None], input_precision="ieee")
    return total, weight * decay + tl.sum(exponentials, 1), new_top


@triton.jit
def _load_keys(cached, batch, group, first, end, DIM: tl.constexpr, COUNT: tl.constexpr):
    """(COUNT, DIM), from key first on; zeros from end on."""
    key, column = first + tl.arange(0, COUNT), tl.arange(0, DIM)[None, :]
    keys = cached.kv_keys + batch * cached.kv_keys_b + group * cached.kv_keys_g
    return tl.load(keys + key[:, None] * cached.kv_keys_n + column, (key < end)[:, None], 0.0)


@triton.jit
def _load_values(cached, batch, group, first, end, DIM: tl.constexpr, COUNT: tl.constexpr):
    """As _load_keys."""
    key, column = first + tl.arange(0, COUNT), tl.arange(0, DIM)[None, :]
    values = cached.kv_values + batch * cached.kv_values_b + group * cached.kv_values_g
    return tl.load(values + key[:, None] * cached.kv_values_n + column, (key < end)[:, None], 0.0)


@triton.jit
def _attend_cached(queries, k, v, start, end, scale, shares, DIM: tl.constexpr, PARTS: tl.constexpr):
    """(total, weight, top) of every warp's share so far, with its part of one step's keys and values."""
    SHARE_OF: tl.constexpr = k.shape[0] // PARTS
    total, weight, top = shares
    share_k = tl.permute(tl.reshape(k, (PARTS, SHARE_OF, DIM)), (0, 2, 1))
    share_v = tl.reshape(v, (PARTS, SHARE_OF, DIM))
    key = start + tl.arange(0, PARTS)[:, None] * SHARE_OF + tl.arange(0, SHARE_OF)[None, :]
    scores = tl.dot(queries, share_k, input_precision="ieee") * scale
    scores = tl.where((key < end)[:, None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 2))
    base = finite(new_top)
    exponentials = tl.exp2(scores - base[:, :, None])
    decay = tl.exp2(top - base)
    total = tl.dot(exponentials.to(v.dtype), share_v, total * decay[:, :, None], input_precision="ieee")
    return total, weight * decay + tl.sum(exponentials, 2), new_top


@triton.jit
def attention_ahead(
    program, cached, tiles, groups, DIM: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, PREFETCH: tl.constexpr
):
    """What a tile loads before the wait: for attention_after."""
    group, batch = tl.cast(program // tiles % groups, tl.int64), tl.cast(program // tiles // groups, tl.int64)
    first = tl.maximum(tl.load(cached.begin + batch), 0)
    end = tl.minimum(tl.load(cached.end + batch), cached.length)
    k = _load_keys(cached, batch, group, first, end, DIM, COUNT)
    v = _load_values(cached, batch, group, first, end, DIM, COUNT)
    if PREFETCH and STEPS > 1:
        LINE: tl.constexpr = 1024 // cached.kv_keys.dtype.element_ty.primitive_bitwidth
        column = tl.arange(0, triton.cdiv(DIM, LINE))[None, :] * LINE
        keys = cached.kv_keys + batch * cached.kv_keys_b + group * cached.kv_keys_g + column
        values = cached.kv_values + batch * cached.kv_values_b + group * cached.kv_values_g + column
        for start in range(first + COUNT, end, COUNT):
            key = tl.minimum(start + tl.arange(0, COUNT), end - 1)[:, None]
            prefetch_l2(keys + key * cached.kv_keys_n)
            prefetch_l2(values + key * cached.kv_values_n)
    return first, end, k, v


@triton.jit
def attention_after(
    ahead,
    program,
    own,
    cached,
    out,
    out_b,
    out_m,
    tiles,
    groups,
    queries,
    window,
    context,
    scale,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
    ROLLED: tl.constexpr = False,
):
    """The rest of a tile, once its queries and own keys are there. ROLLED: in fewer registers, a step after the
    other, values not ahead."""
    dtype: tl.constexpr = cached.kv_keys.dtype.element_ty
    tile = program % tiles
    group, batch = tl.cast(program // tiles % groups, tl.int64), tl.cast(program // tiles // groups, tl.int64)
    packed = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row, head = packed // SHARE, group * SHARE + packed % SHARE
    column = tl.arange(0, DIM)[None, :]
    # Those behind the last are the last again.
    near = tl.minimum(row, queries - 1)
    q_place = own.q + batch * own.q_b + head * own.q_h + near * own.q_m
    loaded_query = _load_head(q_place, own, batch, near, DIM)
    loaded = _load_own(own, batch, group, 0, queries, SHARE, DIM, OWN)
    query = _turn(loaded_query, own, own.q_weight, dtype, DIM)
    state = nothing_yet(BLOCK_M, DIM)
    state = _attend_own(query, loaded, own, 0, packed, queries, window, context, scale, state, SHARE, DIM, OWN)
    for start in range(OWN, tl.minimum(queries * SHARE, (tile + 1) * BLOCK_M), OWN):
        loaded = _load_own(own, batch, group, start, queries, SHARE, DIM, OWN)
        state = _attend_own(query, loaded, own, start, packed, queries, window, context, scale, state, SHARE, DIM, OWN)
    own_total, own_weight, own_top = state

    first, end, k, v = ahead
    queries_of_parts = tl.broadcast_to(query[None, :, :], (PARTS, BLOCK_M, DIM))
    total = tl.full((PARTS, BLOCK_M, DIM), 0.0, tl.float32)
    weight = tl.full((PARTS, BLOCK_M), 0.0, tl.float32)
    top = tl.full((PARTS, BLOCK_M), float("-inf"), tl.float32)
    shares = total, weight, top
    if ROLLED:
        for step in tl.range(STEPS, num_stages=1):
            if step > 0:
                k = _load_keys(cached, batch, group, first + step * COUNT, end, DIM, COUNT)
            v = _load_values(cached, batch, group, first + step * COUNT, end, DIM, COUNT)
            shares = _attend_cached(queries_of_parts, k, v, first + step * COUNT, end, scale, shares, DIM, PARTS)
    else:
        for step in tl.static_range(STEPS):
            if step > 0:
                k = _load_keys(cached, batch, group, first + step * COUNT, end, DIM, COUNT)
                v = _load_values(cached, batch, group, first + step * COUNT, end, DIM, COUNT)
            shares = _attend_cached(queries_of_parts, k, v, first + step * COUNT, end, scale, shares, DIM, PARTS)
    total, weight, top = shares

    most = tl.maximum(tl.max(top, 0), own_top)
    # Every query sees itself: it has a maximum.
    grow, own_grow = tl.exp2(top - most[None, :]), tl.exp2(own_top - most)
    weight_all = tl.sum(weight * grow, 0) + own_weight * own_grow
    mixed = tl.sum(total * grow[:, :, None], 0) + own_total * own_grow[:, None]
    place = out + batch * out_b + row[:, None] * out_m + head[:, None] * DIM + column
    tl.store(place, (mixed / weight_all[:, None]).to(out.dtype.element_ty), (row < queries)[:, None])


@triton.jit
def _whole_attention(
    own,
    cached,
    out,
    out_b,
    out_m,
    tiles,
    groups,
    queries,
    window,
    context,
    scale,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COUNT: tl.constexpr,
    STEPS: tl.constexpr,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    ahead = attention_ahead(program, cached, tiles, groups, DIM, COUNT, STEPS, PDL)
    gdc_begin(PDL)
    attention_after(
        ahead, program, own, cached, out, out_b, out_m, tiles, groups, queries, window, context, scale, SHARE, DIM,
        BLOCK_M, COUNT, STEPS, PARTS, OWN,
    )  # fmt: skip


def launch_whole_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_keys: Tensor,
    kv_values: Tensor,
    begin: Tensor,
    end: Tensor,
    out: Tensor,
    window: int | None,
    context: int,
    heads: Heads | None,
    tactic: Tactic,
    own_block: int,
) -> None:
    """lambda_attention by this schedule; its arguments are checked. tactic.block_n: of a step's keys, one warp's."""
    batch, query_heads, queries, dim = q.shape
    groups, length = kv_keys.shape[1], kv_keys.shape[2]
    if tactic.split_k != 1:
        raise ValueError(f"tactic.split_k: expected 1 with schedule 'whole', got {tactic.split_k}")
    share, count = query_heads // groups, tactic.block_n * tactic.warps
    tiles = triton.cdiv(queries * share, tactic.block_m)
    launch(
        _whole_attention,
        (tiles * groups * batch,),
        {
            "own": Own(
                **strided("q", q, "bhm"),
                **strided("k", k, "bhm"),
                **strided("v", v, "bhm"),
                q_weight=None if heads is None else heads.q_weight,
                k_weight=None if heads is None else heads.k_weight,
                eps=0.0 if heads is None else heads.eps,
                **strided("cos", None if heads is None else heads.cos, "bm"),
                **strided("sin", None if heads is None else heads.sin, "bm"),
            ),
            "cached": Cached(
                **strided("kv_keys", kv_keys, "bgn"),
                **strided("kv_values", kv_values, "bgn"),
                begin=begin,
                end=end,
                length=length,
            ),
            **strided("out", out, "bm"),
            "tiles": tiles,
            "groups": groups,
            "queries": queries,
            "window": queries if window is None else window,
            "context": context,
            "scale": dim**-0.5 * LOG2_E,
            "SHARE": share,
            "DIM": dim,
            "BLOCK_M": tactic.block_m,
            "COUNT": count,
            "STEPS": triton.cdiv(length, count),
            "PARTS": tactic.warps,
            # All of few own keys come in one trip.
            "OWN": min(own_block, max(16, triton.next_power_of_2(queries * share))),
        },
        tactic.warps,
        tactic.stages,
    )
